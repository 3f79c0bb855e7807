"""What one node says about itself before training. Standard library and psutil; torch only to count GPUs."""

import math
import os
import socket
import tempfile
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path

import psutil

WRITE_BYTES = 4 * 2**20


@dataclass(kw_only=True, slots=True)
class Wanted:
    """What a node must have."""

    gpus: int = 0
    cpus: int = 1
    memory_gb: float = 0.0
    clock_s: float = 2.0
    "largest difference between its clock and that of the first node"
    slow_factor: float = 4.0
    "a node whose link is so many times slower than the median is bad; only among 3 nodes or more"


@dataclass(kw_only=True, slots=True)
class Facts:
    """What a node has."""

    node: str
    gpus: int
    cpus: int
    memory_gb: float
    write_s: float
    "for a small file in run_dir"
    write_error: str
    "empty if it could be written"


def gather_facts(run_dir: str, *, count_gpus: bool, timeout_s: float) -> Facts:
    """Look at this node.

    Args:
        run_dir: where it must be able to write.
        count_gpus: whether GPUs are wanted at all; importing torch takes seconds.
        timeout_s: longest wait for the file system.
    """
    write_s, error = _try_to_write(Path(run_dir), timeout_s)
    return Facts(
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        gpus=_num_gpus() if count_gpus else 0,
        cpus=os.cpu_count() or 1,
        memory_gb=psutil.virtual_memory().available / 1e9,
        write_s=write_s,
        write_error=error,
    )


def read_facts(content: object) -> Facts:
    """Check what a node has sent about itself.

    Raises:
        ValueError: if something is missing, unknown, of another type or no finite number.
    """
    types = {field.name: field.type for field in fields(Facts)}
    if not isinstance(content, dict) or set(content) != set(types):
        raise ValueError("facts of a node: must have exactly the fields of Facts")
    for name, kind in types.items():
        value = content[name]
        # JSON writes 3.0 as 3.0, but True is an int to Python, and NaN a float
        good = type(value) is kind or (kind is float and type(value) is int)
        if not good or (kind is not str and not math.isfinite(value)):
            raise ValueError(f"facts of a node: {name} is none of {kind}")
    return Facts(**content)


def complaints(facts: Facts, wanted: Wanted, clock_s: float) -> list[str]:
    """What is wrong with a node; clock_s: how far its clock is ahead of the first node's."""
    found = []
    if facts.gpus < wanted.gpus:
        found.append(f"{facts.gpus} GPUs instead of {wanted.gpus}")
    if facts.cpus < wanted.cpus:
        found.append(f"{facts.cpus} CPUs instead of {wanted.cpus}")
    if facts.memory_gb < wanted.memory_gb:
        found.append(f"{facts.memory_gb:.1f} GB of memory are free instead of {wanted.memory_gb:g}")
    if abs(clock_s) > wanted.clock_s:
        found.append(f"its clock is off by {clock_s:+.1f} s")
    if facts.write_error:
        found.append(f"run_dir cannot be written: {facts.write_error}")
    return found


def _num_gpus() -> int:
    # not at the top of the file: it takes seconds, and nodes without GPUs need none of it here
    import torch

    return torch.cuda.device_count()


def _try_to_write(run_dir: Path, timeout_s: float) -> tuple[float, str]:
    """Seconds and error; a file system that does not answer keeps only the thread waiting."""
    result: list[str] = []

    def write() -> None:
        try:
            with tempfile.TemporaryFile(dir=run_dir) as file:
                file.write(bytes(WRITE_BYTES))
                file.flush()
                os.fsync(file.fileno())
            result.append("")
        except OSError as error:
            result.append(f"{error.strerror}: {run_dir}")

    start = time.perf_counter()
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(timeout_s)
    seconds = time.perf_counter() - start
    return seconds, result[0] if result else f"no answer within {timeout_s:g} s: {run_dir}"

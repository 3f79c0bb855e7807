"""Collect what one node says about itself before training, and judge it.

Standard library and psutil; torch only to count GPUs. All nodes look at themselves at once, so 32 nodes take
no longer than one; only the 4 MiB that each writes into run_dir add up, to 128 MiB.
"""

import math
import os
import socket
import tempfile
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path

import psutil

# little enough for all nodes to write at once
WRITE_BYTES = 4 * 2**20


@dataclass(kw_only=True, slots=True)
class Wanted:
    """Say what a node must have."""

    gpus: int = 0
    "at least"
    cpus: int = 1
    "at least, logical ones"
    memory_gb: float = 0.0
    "at least, free, in units of 10**9 bytes"
    clock_s: float = 2.0
    "largest difference in seconds between its clock and that of the first node"
    slow_factor: float = 4.0
    "a node whose link is so many times slower than the median is bad; only among 3 nodes or more"


@dataclass(kw_only=True, slots=True)
class Facts:
    """Say what a node has."""

    node: str
    "its name in Slurm, else its host name"
    gpus: int
    "that torch sees; 0 where none were asked for"
    cpus: int
    "logical ones of the machine"
    memory_gb: float
    "free, in units of 10**9 bytes"
    write_s: float
    "seconds for WRITE_BYTES in run_dir, synced"
    write_error: str
    "empty if it could be written"


def gather_facts(run_dir: str, *, count_gpus: bool, timeout_s: float) -> Facts:
    """Look at this node.

    Args:
        run_dir: where it must be able to write.
        count_gpus: GPUs are wanted at all; importing torch to count them takes seconds.
        timeout_s: longest wait for the file system, in seconds.
    """
    write_s, error = _try_to_write(Path(run_dir), timeout_s)
    return Facts(
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        gpus=_num_gpus() if count_gpus else 0,
        # those that this process may use: a shared node gives a job a part of them
        cpus=len(os.sched_getaffinity(0)),
        memory_gb=psutil.virtual_memory().available / 1e9,
        write_s=write_s,
        write_error=error,
    )


def read_facts(content: object) -> Facts:
    """Check what a node has sent about itself.

    The node is known by its signature, but a fault in it must not end the check of all others.

    Args:
        content: as JSON gives it.

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
    """List what is wrong with a node.

    Args:
        facts: of the node.
        wanted: that it should have.
        clock_s: seconds by which its clock is ahead of the first node's.

    Example: 7 GPUs of 8 and a clock 3.2 s ahead -> ["7 GPUs instead of 8", "its clock is off by +3.2 s"].
    """
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
    """Count the GPUs that torch sees."""
    # not at the top of the file: it takes seconds, and nodes without GPUs need none of it here
    import torch

    return torch.cuda.device_count()


def _try_to_write(run_dir: Path, timeout_s: float) -> tuple[float, str]:
    """Write a file in run_dir, and return seconds and error.

    A thread, for a write to a file system that has lost its server cannot be interrupted: the process then
    still reports in time, and the daemon thread does not keep it from ending.
    """
    result: list[str] = []

    def write() -> None:
        try:
            with tempfile.TemporaryFile(dir=run_dir) as file:
                file.write(bytes(WRITE_BYTES))
                file.flush()
                # the write alone ends in this node's memory
                os.fsync(file.fileno())
            result.append("")
        except OSError as error:
            result.append(f"{error.strerror}: {run_dir}")

    start = time.perf_counter()
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    # if it hangs, `result` stays empty
    thread.join(timeout_s)
    seconds = time.perf_counter() - start
    return seconds, result[0] if result else f"no answer within {timeout_s:g} s: {run_dir}"

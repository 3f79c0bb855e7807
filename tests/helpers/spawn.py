"""Run one function on several ranks, each a process of its own, forked from one that has imported torch."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers import devices, fork_server
from tests.helpers.pretended_gpu.build import build

# Time for ranks that lost their peer to say so, before they are killed
GRACE_S = 2.0


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = 300,
    fresh: bool = False,
    device: str | None = None,
) -> list[Any]:
    """Call fn(rank, world_size, *args) on every rank.

    Args:
        world_size: number of processes.
        fn: at module level of an importable module; finds an initialised default group, of gloo or what
            `devices` says.
        args: must be picklable.
        timeout_s: all ranks are killed after this time, which also bounds every collective.
        fresh: import everything anew in each rank, for what reads the environment when it is imported
            (Triton, which Megatron imports where it is installed).
        device: where the ranks compute, see `devices`; None: what the environment says.

    Returns:
        What fn returned, by rank; must be picklable.

    Raises:
        RuntimeError: with the traceback of the rank that failed first.
        TimeoutError: if a rank was still running after timeout_s.
    """
    device = device or devices.chosen()
    if device == "pretended":
        build()
    forked = fork_server.is_usable() and not fresh
    context: Any = fork_server.context() if forked else multiprocessing.get_context("spawn")
    # the ranks take over the environment first, then import what fn needs
    call = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        processes: list[BaseProcess] = [
            context.Process(
                target=_main,
                args=(rank, world_size, folder, timeout_s, os.environ | {devices.VARIABLE: device}, call),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            failed, cut_short = _wait(processes, Path(folder), time.monotonic() + timeout_s)
        finally:
            _kill(processes)
        if failed:
            raise RuntimeError(f"{fn.__qualname__}: {_first_failure(processes, Path(folder), failed)}")
        if cut_short:
            raise TimeoutError(f"{fn.__qualname__}: ranks {cut_short} still ran after {timeout_s} s")
        return [pickle.loads((Path(folder) / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _main(
    rank: int, world_size: int, folder: str, timeout_s: float, environment: dict[str, str], call: bytes
) -> None:
    fork_server.take_over(environment)
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        # host names that do not resolve, or resolve to a firewalled address, are common in containers
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fn, args = pickle.loads(call)
        devices.prepare_rank(rank)
        dist.init_process_group(
            devices.backend(),
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        result = pickle.dumps(fn(rank, world_size, *args))
    except BaseException:
        _write(Path(folder) / f"error_{rank}", f"{time.time()}\n{traceback.format_exc()}".encode())
        # a normal exit would wait for peers in the destructors of process groups
        os._exit(1)
    dist.barrier()
    _write(Path(folder) / f"result_{rank}", result)
    dist.destroy_process_group()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content)
    partial.rename(path)


def _wait(processes: list[BaseProcess], folder: Path, deadline: float) -> tuple[list[int], list[int]]:
    """Wait, after a failure only a little longer. Returns the ranks that failed, and those cut short."""
    running, failed = dict(enumerate(processes)), []
    while running and (left := deadline - time.monotonic()) > 0:
        wait([process.sentinel for process in running.values()], timeout=left)
        for rank in [rank for rank, process in running.items() if not process.is_alive()]:
            del running[rank]
            # a rank that left its result has not failed, even if gloo aborts it while it ends
            if not (folder / f"result_{rank}").exists():
                deadline = deadline if failed else min(deadline, time.monotonic() + GRACE_S)
                failed.append(rank)
    return failed, list(running)


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None:
            process.kill()
            process.join()


def _first_failure(processes: list[BaseProcess], folder: Path, failed: list[int]) -> str:
    """A rank that ended without a word comes before those that raised: they lost their peer."""
    raised: list[tuple[float, int, str]] = []
    for rank in failed:
        path, code = folder / f"error_{rank}", processes[rank].exitcode or 0
        if not path.exists():
            return f"rank {rank} ended by {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        time_text, _, text = path.read_text().partition("\n")
        raised.append((float(time_text), rank, text))
    _, rank, text = min(raised)
    return f"rank {rank} of {len(processes)} failed first:\n{text}"

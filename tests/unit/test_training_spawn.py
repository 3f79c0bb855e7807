"""The helper that runs ranks: results, first failures, deaths, time limits."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.helpers.spawn import run_ranks


def add_up(rank: int, world_size: int, factor: int) -> tuple[int, float, str]:
    assert torch.get_num_threads() == 1
    total = torch.tensor(float(rank + 1)) * factor
    dist.all_reduce(total)
    return rank, float(total), os.environ.get("TEST_SPAWN", "")


def raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one does not like this")
    dist.barrier()


def die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def leave_on_zero(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(3)
    dist.barrier()


def hang(rank: int, world_size: int) -> None:
    time.sleep(rank * 60)


@pytest.mark.parametrize("world_size", [1, 3])
def test_results_by_rank(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_SPAWN", str(world_size))
    total = 10.0 * sum(range(1, world_size + 1))
    assert run_ranks(world_size, add_up, 10) == [(r, total, str(world_size)) for r in range(world_size)]


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (
            raise_on_one,
            r"(?s)raise_on_one: rank 1 of 2 failed first:.*ValueError: rank one does not like this",
        ),
        (die_on_one, "die_on_one: rank 1 ended by SIGSEGV"),
        (leave_on_zero, "leave_on_zero: rank 0 ended by exit code 3"),
    ],
)
def test_first_failure_is_named(fn: Callable[..., None], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        run_ranks(2, fn, timeout_s=60)


def test_time_limit() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] still ran after 5 s"):
        run_ranks(2, hang, timeout_s=5)
    assert time.monotonic() - start < 30

"""Initial weights are drawn by several threads, in the order of the parameters."""

import threading
import time
from typing import Any

import pytest

from msa_train.model import init_weights
from msa_train.model.init_weights import _computed, _num_threads


@pytest.mark.parametrize("num_threads", [1, 3])
def test_values_come_in_order_and_few_are_there_at_a_time(num_threads: int) -> None:
    lock, there, most = threading.Lock(), 0, 0

    def compute(item: Any) -> Any:
        nonlocal there, most
        with lock:
            there += 1
            most = max(most, there)
        # the first ones take longest
        time.sleep(0.01 * (item < 2))
        return 10 * item

    found = []
    for item, value in _computed(compute, range(9), num_threads):  # type: ignore[arg-type]
        with lock:
            there -= 1
        found.append((item, value))
    assert found == [(item, 10 * item) for item in range(9)]
    assert most <= num_threads


@pytest.mark.parametrize(
    ("processors", "ranks", "threads"), [(96, "8", 8), (32, "8", 4), (2, "4", 1), (6, None, 6)]
)
def test_processors_are_shared_by_the_ranks_of_a_machine(
    processors: int, ranks: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init_weights.os, "sched_getaffinity", lambda _: set(range(processors)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert _num_threads() == threads

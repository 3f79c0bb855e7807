"""Work that all ranks do at once and that fails on all of them if it fails on one."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from msa_train.parallel.fault_watch import watched
from msa_train.training.generation import SupersededError

T = TypeVar("T")
_working: set[int] = set()


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or loaded. Raised on all ranks with the same text.

    is_final: another try would not help, and the run must not go on: another start has taken over.
    """

    def __init__(self, text: str, *, is_final: bool = False) -> None:
        super().__init__(text)
        self.is_final = is_final


@contextmanager
def at_work() -> Iterator[None]:
    """This thread does its own part of what all ranks do, and waits for none."""
    thread = threading.get_ident()
    _working.add(thread)
    try:
        yield
    finally:
        _working.discard(thread)


def works(thread: int) -> bool:
    """Whether a thread of this process, by its identifier, is `at_work`."""
    return thread in _working


def together(work: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Do `work` on every rank and exchange the results, by rank; a failure anywhere is raised everywhere.

    Raises:
        CheckpointError: with rank and cause.
    """
    result, text, cause, is_final = None, "", None, False
    try:
        with at_work():
            result = work()
    except CheckpointError as error:
        # all ranks have it already
        cause, text, is_final = error, str(error), error.is_final
    except Exception as error:
        cause, text = error, f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        is_final = isinstance(error, SupersededError)
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    with watched("save"):
        dist.all_gather_object(outcomes, (text, is_final, result), group=group)
    failures = list(dict.fromkeys(text for text, *_ in outcomes if text))
    if failures:
        is_final = any(final for _, final, _ in outcomes)
        raise CheckpointError("; ".join(failures[:2]), is_final=is_final) from cause
    return [result for *_, result in outcomes]

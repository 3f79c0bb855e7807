"""Do work on all ranks at once, so that it fails on all of them if it fails on one.

A rank that raised alone would leave the others in the next collective until its timeout, with no word of the
cause. So between two exchanges no rank leaves: it finishes its part, hands over its error as text, and all
raise together.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from msa_train.parallel.comm.fault_watch import watched
from msa_train.runtime.fencing import SupersededError

T = TypeVar("T")
_working: set[int] = set()


class CheckpointError(RuntimeError):
    """Report that a checkpoint could not be saved or loaded. Raised on all ranks with the same text."""

    def __init__(self, text: str, *, is_final: bool = False) -> None:
        super().__init__(text)
        self.is_final = is_final
        "another try would not help, and the run must not go on: another start has taken over"


@contextmanager
def at_work() -> Iterator[None]:
    """Mark this thread as doing its own part of what all ranks do; outside it may be waiting for others."""
    thread = threading.get_ident()
    _working.add(thread)
    try:
        yield
    finally:
        _working.discard(thread)


def works(thread: int) -> bool:
    """Tell whether a thread of this process, by its identifier, is `at_work`."""
    return thread in _working


def run_on_all_ranks(work: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Do `work` on every rank and exchange the results, by rank; a failure anywhere is raised everywhere.

    Costs one all-gather of pickled results: at 256 ranks, 256 times the size of one rank's result on each of
    them. So results are names, counts and checksums, never tensors.

    Args:
        work: this rank's part. Where it has collectives of its own, no rank may fail alone before them: the
            others would wait in them.
        group: all ranks; the default group if None.

    Returns:
        The results of all ranks, by rank.

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
    # Reached with and without an error: a rank that skipped this exchange would hold up all others in it.
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    with watched("save"):
        dist.all_gather_object(outcomes, (text, is_final, result), group=group)
    # one cause often fails many ranks with one text, e.g. a full disk
    failures = list(dict.fromkeys(text for text, *_ in outcomes if text))
    if failures:
        is_final = any(final for _, final, _ in outcomes)
        raise CheckpointError("; ".join(failures[:2]), is_final=is_final) from cause
    return [result for *_, result in outcomes]

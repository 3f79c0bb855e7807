"""Work that all ranks do at once and that fails on all of them if it fails on one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or loaded. Raised on all ranks with the same text."""


def together(work: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Do `work` on every rank and exchange the results, by rank; a failure anywhere is raised everywhere.

    Raises:
        CheckpointError: with rank and cause.
    """
    result, text, cause = None, "", None
    try:
        result = work()
    except CheckpointError as error:
        # all ranks have it already
        cause, text = error, str(error)
    except Exception as error:
        cause, text = error, f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (text, result), group=group)
    failures = list(dict.fromkeys(text for text, _ in outcomes if text))
    if failures:
        raise CheckpointError("; ".join(failures[:2])) from cause
    return [result for _, result in outcomes]

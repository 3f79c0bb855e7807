"""Find weights and moments that are not finite: an update can spoil them after a finite loss and gradient.

Each rank reads its numbers once, where they lie: before a save those that it writes, after loading those that
it holds, 14 bytes per parameter with Adam in bf16. For m3 on 256 ranks with ep 64 that is 90 GB of experts on
each rank that writes some. Between ranks only names go around, of tensors that are not finite.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.checkpoint.all_ranks import CheckpointError, run_on_all_ranks
from msa_train.checkpoint.store import CheckpointStore

# tensors that an error names; a spoilt update often spoils all
_NAMED = 3


class NotFiniteError(CheckpointError):
    """Report that a checkpoint holds numbers that are not finite."""

    def __init__(self, path: object, names: str) -> None:
        self.reason = f"not finite: {names}"
        "which tensors, for the user"
        super().__init__(f"checkpoint {path} is {self.reason}")


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Name the tensors that hold a number which is not finite.

    Smallest and largest number tell it: any infinity is one of the two, and a NaN becomes both.

    One pass without a copy, a small part of an update's time; the host waits once for each device.
    """
    ends: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        # types of 8 bits know neither order nor infinity
        if tensor.numel() and tensor.is_floating_point() and tensor.element_size() > 1:
            # what is not a number goes through to both
            both = torch.stack(torch.aminmax(tensor.detach())).double()
            # step counts of an optimizer lie on the host, its moments on a GPU
            ends.setdefault(tensor.device, []).append((name, both))
    found: set[str] = set()
    for pairs in ends.values():
        is_finite = torch.stack([both for _, both in pairs]).isfinite().all(dim=1).tolist()
        found |= {name for (name, _), finite in zip(pairs, is_finite, strict=True) if not finite}
    return found


def listed(names: Iterable[set[str]]) -> str:
    """Join the names of all ranks to a short text, empty where there are none.

    Example: [{"b"}, {"a", "b"}] -> "a, b".
    """
    together_names = sorted(set().union(*names))
    more = f" and {len(together_names) - _NAMED} more" if len(together_names) > _NAMED else ""
    return ", ".join(together_names[:_NAMED]) + more


def check_loaded(path: object, state: Any, group: dist.ProcessGroup | None) -> None:
    """Refuse what was loaded from a checkpoint if it is not finite on any rank. All ranks call it.

    Args:
        path: the checkpoint, for the message.
        state: nested dicts and lists of tensors, this rank's.
        group: all ranks; the default group if None.

    Raises:
        NotFiniteError: on all ranks.
    """
    names = listed(run_on_all_ranks(lambda: not_finite(_leaves(state)), group))
    if names:
        raise NotFiniteError(path, names)


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dicts and lists with their place: {"model": {"w": t}} -> ("model.w", t)."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict | list):
        entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in entries:
            yield from _leaves(value, f"{name}.{key}" if name else str(key))


class DivergedError(RuntimeError):
    """Report that a loss or the gradient is not finite."""


class SpoiltStateError(DivergedError):
    """Report that an update has left weights or moments that are not finite."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason
        "which tensors, for the user"


def spoilt_state(step: int, names: str, store: CheckpointStore) -> SpoiltStateError:
    """Make the error of what is found before a save, as `diverged` of what is found in a step."""
    reason = f"the update left {names} not finite"
    return SpoiltStateError(str(diverged(step, reason, store)), reason)


def diverged(step: int, reason: str, store: CheckpointStore) -> DivergedError:
    """Make the error that ends a run, with where to go on from."""
    saved = store.steps()
    kept = f"the newest checkpoint is of step {max(saved)}" if saved else "there is no checkpoint yet"
    return DivergedError(
        f"step {step}: {reason}; the step is not saved, {kept}; the same command would come here again: "
        "use a lower optim.lr or optim.clip_grad, or more optim.warmup_steps"
    )

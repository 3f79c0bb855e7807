"""Ends a run whose numbers are no longer finite, before its weights reach a checkpoint."""

import math
from collections.abc import Mapping
from typing import Any

from msa_train.training.checkpoint_store import CheckpointStore

VALIDATION = "val_loss"
# Equal on all ranks, so that all of them stop.
_WATCHED = ("lm_loss", "kl_loss", "grad_norm", VALIDATION)


class DivergedError(RuntimeError):
    """A loss or the gradient is not finite."""


class SpoiltStateError(DivergedError):
    """An update has left weights or moments that are not finite; reason: which."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


def check_finite(step: int, values: Mapping[str, Any], store: CheckpointStore, where: str = "") -> None:
    """Refuse to go on from a step that has spoilt the weights.

    Args:
        step: that was made.
        values: its metrics.
        store: of the run's checkpoints.
        where: it was first met, follows what is not finite.

    Raises:
        DivergedError: in one line, what is not finite and where to go on from.
    """
    bad = not_finite(values)
    if bad:
        raise diverged(step, f"{', '.join(bad)}: not finite{where}", store)


def not_finite(values: Mapping[str, Any]) -> list[str]:
    """What must be finite and is not, e.g. ["grad_norm=nan"]."""
    return [f"{name}={values[name]}" for name in _WATCHED if not math.isfinite(values.get(name, 0.0))]


def spoilt_state(step: int, names: str, store: CheckpointStore) -> SpoiltStateError:
    """As `diverged`, for what is found before a save."""
    reason = f"the update left {names} not finite"
    return SpoiltStateError(str(diverged(step, reason, store)), reason)


def diverged(step: int, reason: str, store: CheckpointStore) -> DivergedError:
    """The error that ends a run, with where to go on from."""
    saved = store.steps()
    kept = f"the newest checkpoint is of step {max(saved)}" if saved else "there is no checkpoint yet"
    return DivergedError(
        f"step {step}: {reason}; the step is not saved, {kept}; the same command would come here again: "
        "use a lower optim.lr or optim.clip_grad, or more optim.warmup_steps"
    )

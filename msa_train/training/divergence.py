"""Ends a run whose numbers are no longer finite, before its weights reach a checkpoint."""

import math
from collections.abc import Mapping
from typing import Any

# Equal on all ranks, so that all of them stop.
_WATCHED = ("lm_loss", "kl_loss", "grad_norm", "val_loss")


class DivergedError(RuntimeError):
    """A loss or the gradient is not finite."""


def check_finite(step: int, values: Mapping[str, Any], saved_step: int | None) -> None:
    """Refuse to go on from a step that has spoilt the weights.

    Args:
        step: that was made.
        values: its metrics.
        saved_step: of the newest checkpoint, None without one.

    Raises:
        DivergedError: in one line, what is not finite and where to go on from.
    """
    bad = [f"{name}={values[name]}" for name in _WATCHED if not math.isfinite(values.get(name, 0.0))]
    if not bad:
        return
    kept = (
        "there is no checkpoint yet"
        if saved_step is None
        else f"the newest checkpoint is of step {saved_step}"
    )
    raise DivergedError(
        f"step {step}: {', '.join(bad)}: not finite; the step is not saved, {kept}; the same command "
        "would come here again: use a lower optim.lr or optim.clip_grad, or more optim.warmup_steps"
    )

"""End a run whose numbers are no longer finite, before its weights reach a checkpoint.

Looks at four numbers that the metrics have gathered anyway; weights themselves are looked at before a save.
"""

import math
from collections.abc import Mapping
from typing import Any

from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.finite_state import diverged

VALIDATION = "val_loss"
# Equal on all ranks, so that all of them stop.
_WATCHED = ("lm_loss", "kl_loss", "grad_norm", VALIDATION)


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
    """List what must be finite and is not, e.g. ["grad_norm=nan"]; absent metrics are fine."""
    return [f"{name}={values[name]}" for name in _WATCHED if not math.isfinite(values.get(name, 0.0))]

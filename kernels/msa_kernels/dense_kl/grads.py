"""Hold what one part of the dense KL loss leaves."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class DenseKlGrads:
    """Hold gradients and value over one part of the keys; gradients in the compute dtype."""

    dq_index: Tensor
    """[M, Q, Di] of the index queries, this part's share."""
    dk_index: Tensor
    """[K, Di] of the part's index keys."""
    kl: Tensor | None
    """Unweighted sum of the divergences over this part's tokens, fp64 scalar, in nats; None if not wanted."""

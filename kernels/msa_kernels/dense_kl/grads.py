"""What one part of the dense KL loss leaves."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class DenseKlGrads:
    """dq_index [M, Q, Di], dk_index [K, Di] in the compute dtype; kl: unweighted sum, fp64 scalar."""

    dq_index: Tensor
    dk_index: Tensor
    kl: Tensor

"""Arguments and results of attention over a pool of KV blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.window import TokenWindow


@dataclass(slots=True)
class SparseQueries:
    """The query side of one call, this rank's tokens.

    q: [T, M, G, D]; position: [T] int64 in the pack. q_index: [T, M, Di] and k_index: [NB, B, Di], index
    keys of the whole pack by block, or None when the KL loss is not computed. temperature: divides the
    logits of the KL loss's teacher; index_scale must be divided by it already. window: which tokens of its
    blocks a query sees; None: all but the future.
    """

    q: Tensor
    position: Tensor
    softmax_scale: float
    q_index: Tensor | None = None
    k_index: Tensor | None = None
    index_scale: float = 1.0
    temperature: float = 1.0
    window: TokenWindow | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of scores and sums."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


@dataclass(slots=True)
class BlockPool:
    """Readable (block, group) pairs. kv: [N, 2, B, D] keys and values; block: [N] int64 global block ids."""

    kv: Tensor
    block: Tensor


@dataclass(slots=True)
class PoolOutput:
    """Attention over one pool: out [T, M, G, D], lse [T, M, G].

    With a KL loss also lse_index [T, M] and, where the temperature is not 1, lse_teacher [T, M, G].
    """

    out: Tensor
    lse: Tensor
    lse_index: Tensor | None
    lse_teacher: Tensor | None


@dataclass(slots=True)
class KlTerm:
    """The KL loss in a backward pass; log-sum-exps as in PoolOutput, merged over pools.

    weight: factor of sum over queries and groups of the divergence.
    """

    lse_index: Tensor
    weight: float
    lse_teacher: Tensor | None = None


@dataclass(slots=True)
class PoolGrads:
    """Gradients over one pool, in the compute dtype.

    dq [T, M, G, D]; dkv [N, 2, B, D]; with a KL term dq_index [T, M, Di], dk_index [N, B, Di] and kl, the
    unweighted sum of the divergences over this pool's tokens (fp64 scalar).
    """

    dq: Tensor
    dkv: Tensor
    dq_index: Tensor | None
    dk_index: Tensor | None
    kl: Tensor | None

"""Hold arguments and results of attention over a pool of KV blocks.

Shapes: T queries, M KV heads, G query heads of each, D head dim, Di index head dim, N physical blocks of a
pool, NB blocks of the pack, B tokens of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.window import TokenWindow


@dataclass(slots=True)
class SparseQueries:
    """Describe the query side of one call: this rank's tokens."""

    q: Tensor
    """[T, M, G, D] queries, any float dtype."""
    position: Tensor
    """[T] int64 positions in the pack, in tokens."""
    softmax_scale: float
    """Factor of the scores, above 0."""
    q_index: Tensor | None = None
    """[T, M, Di] index queries; None when the KL loss is not computed."""
    k_index: Tensor | None = None
    """[NB, B, Di] index keys of the whole pack, by block; None as q_index."""
    index_scale: float = 1.0
    """Factor of the index scores, divided by `temperature` already."""
    temperature: float = 1.0
    """Divides the logits of the KL loss's teacher."""
    window: TokenWindow | None = None
    """Tokens of its blocks that a query sees; None: all but the future."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of scores and sums."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


@dataclass(slots=True)
class BlockPool:
    """Hold the blocks that can be read: physical block n is one block of one KV head, as in a paged cache.

    Example: with blocks 4 and 0 of KV head 0 and block 4 of KV head 1, block is [4, 0, 4], and a query whose
    KV head 1 selected block 4 has 2 in its block table. The pool does not know of heads, the block table
    does.
    """

    kv: Tensor
    """[N, 2, B, D] keys and values."""
    block: Tensor
    """[N] int64 global ids of the blocks in the pack, from which their tokens' positions follow."""


@dataclass(slots=True)
class PoolOutput:
    """Hold attention over one pool, in the compute dtype."""

    out: Tensor
    """[T, M, G, D] outputs, normalised over this pool."""
    lse: Tensor
    """[T, M, G] natural log of the sums of exponentials."""
    lse_index: Tensor | None
    """[T, M] the same of the index scores; None without index queries."""
    lse_teacher: Tensor | None
    """[T, M, G] the same of the scores divided by the temperature; None where that is 1."""


@dataclass(slots=True)
class KlTerm:
    """Ask for the KL loss in a backward pass; log-sum-exps as in PoolOutput, merged over pools."""

    lse_index: Tensor
    """[T, M] of the index scores."""
    weight: float
    """Factor of the sum over queries and KV heads of the divergence."""
    lse_teacher: Tensor | None = None
    """[T, M, G] at the teacher's temperature; None where that is 1."""
    with_value: bool = True
    """Whether the loss's value is formed beside its gradient, which needs none of it."""


@dataclass(slots=True)
class PoolGrads:
    """Hold gradients over one pool, in the compute dtype; the last three None without a KL term."""

    dq: Tensor
    """[T, M, G, D] of the queries, this pool's share."""
    dkv: Tensor
    """[N, 2, B, D] of keys and values."""
    dq_index: Tensor | None
    """[T, M, Di] of the index queries, this pool's share."""
    dk_index: Tensor | None
    """[N, B, Di] of the index keys, by physical block."""
    kl: Tensor | None
    """Unweighted sum of the divergences over this pool's tokens, fp64 scalar, in nats; None if not wanted."""

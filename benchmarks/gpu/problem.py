"""Shapes and random tensors of one MSA layer on one device.

Shapes: S tokens, T queries, M KV groups, G query heads per group, D head dim, Di index head dim, NB blocks of
B tokens, K blocks per query and group.
"""

from dataclasses import dataclass

import torch
from msa_kernels import select_blocks
from msa_kernels.block_sparse_attention.op import pack_blocks
from msa_kernels.block_sparse_attention.pool import BlockPool, SparseQueries
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Sizes of a layer, MiniMax-M3's by default (arXiv 2606.13392, section 4)."""

    num_heads: int = 64
    num_kv_heads: int = 4
    head_dim: int = 128
    index_head_dim: int = 128
    block_size: int = 128
    topk: int = 16

    @property
    def heads_per_group(self) -> int:
        """G."""
        return self.num_heads // self.num_kv_heads

    def scoring_flops(self, seq_len: int) -> float:
        """Index scores of all causal pairs of tokens."""
        return 2.0 * self.index_head_dim * self.num_kv_heads * seq_len**2 / 2

    def dense_flops(self, seq_len: int) -> float:
        """Forward of causal dense attention; the backward has 2.5 times as many."""
        return 4.0 * self.head_dim * self.num_heads * seq_len**2 / 2

    def pair_flops(self) -> float:
        """Forward of one (query, group) and one block it selected."""
        return 4.0 * self.head_dim * self.heads_per_group * self.block_size

    def kl_pair_flops(self) -> float:
        """Student scores and their two gradients, of one pair."""
        return 6.0 * self.index_head_dim * self.block_size

    def decode_bytes(self, seq_len: int, element_bytes: int) -> int:
        """What one new token must read: all index keys, and K and V of the selected blocks."""
        tokens = min(seq_len, self.topk * self.block_size) * self.num_kv_heads
        return element_bytes * (seq_len * self.index_head_dim + 2 * tokens * self.head_dim)


M3 = LayerSizes()
# for the interpreter, where a tile costs milliseconds
SMOKE = LayerSizes(num_heads=4, num_kv_heads=2, head_dim=16, index_head_dim=16, block_size=16, topk=2)


class Tensors:
    """Random values from one seed, on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values of this dtype."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)


@dataclass(slots=True)
class IndexBranch:
    """Index queries [S, M, Di] and keys [S, Di]."""

    q: Tensor
    k: Tensor


def make_index(tensors: Tensors, sizes: LayerSizes, seq_len: int) -> IndexBranch:
    """Independent values: neighbouring queries choose nothing in common, which is the hardest case."""
    q = tensors.normal(seq_len, sizes.num_kv_heads, sizes.index_head_dim)
    return IndexBranch(q, tensors.normal(seq_len, sizes.index_head_dim))


def select(index: IndexBranch, sizes: LayerSizes, kernel: str) -> Tensor:
    """Blocks of every query of one document: [S, M, K] int32."""
    # document starts stay on the host, where looking at them is free
    return select_blocks(
        index.q, index.k, torch.tensor([0, index.k.shape[0]]),
        block_size=sizes.block_size, topk=sizes.topk, kernel=kernel,
    )  # fmt: skip


@dataclass(slots=True)
class GroupProblem:
    """Attention of all queries over one pool that holds every block of `groups` KV groups."""

    queries: SparseQueries
    pool: BlockPool
    entries: Tensor
    dout: Tensor

    @property
    def num_pairs(self) -> int:
        """(query, group, block) that are computed."""
        return int((self.entries >= 0).sum())


def make_groups(
    tensors: Tensors, sizes: LayerSizes, index: IndexBranch, block_indices: Tensor, *, with_kl: bool
) -> GroupProblem:
    """The first KV groups, as many as block_indices [S, groups, K] has."""
    S, groups, _ = block_indices.shape
    D, B = sizes.head_dim, sizes.block_size
    k, v = (tensors.normal(S, groups, D) for _ in range(2))
    queries = SparseQueries(
        q=tensors.normal(S, groups, sizes.heads_per_group, D),
        position=torch.arange(S, device=tensors.device),
        softmax_scale=D**-0.5,
        q_index=index.q[:, :groups].contiguous() if with_kl else None,
        k_index=index.k.view(-1, B, sizes.index_head_dim) if with_kl else None,
        index_scale=sizes.index_head_dim**-0.5,
    )
    block = torch.arange(S // B, device=tensors.device).repeat(groups)
    ids = block_indices.long()
    first = torch.arange(groups, device=tensors.device)[:, None] * (S // B)
    return GroupProblem(
        queries=queries,
        pool=BlockPool(kv=pack_blocks(k, v, B), block=block),
        entries=torch.where(ids >= 0, ids + first, -1),
        dout=tensors.normal(S, groups, sizes.heads_per_group, D),
    )

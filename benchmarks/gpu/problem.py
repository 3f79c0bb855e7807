"""Make shapes and random tensors of one MSA layer on one device.

Shapes: S tokens, T queries, M KV groups, G query heads per group, D head dim, Di index head dim, NB blocks of
B tokens, K blocks per query and group.
"""

from dataclasses import dataclass

import torch
from msa_kernels import select_blocks
from msa_kernels.block_sparse_attention.op import pack_blocks
from msa_kernels.block_sparse_attention.types import BlockPool, SparseQueries
from torch import Tensor

from benchmarks.gpu.rows import CORRELATED

# Neighbouring queries of correlated selections: so many share a part of their index query, of this weight. At
# 128K tokens 4 of them then select 22.1 different blocks in 64 slots, as a trained M3 was seen to; with
# independent ones it is 60.
RUN_LENGTH = 64
SHARED_WEIGHT = 0.996


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Hold the sizes of a layer, MiniMax-M3's by default (arXiv 2606.13392, section 4)."""

    num_heads: int = 64
    """Query heads."""
    num_kv_heads: int = 4
    """Each with one index head."""
    head_dim: int = 128
    """Of queries, keys and values."""
    index_head_dim: int = 128
    """Of index queries and keys."""
    block_size: int = 128
    """Tokens of a block."""
    topk: int = 16
    """Blocks that a query selects per KV head."""

    @property
    def heads_per_group(self) -> int:
        """Return G, the query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    def scoring_flops(self, seq_len: int, num_queries: int | None = None) -> float:
        """Count FLOP of the index scores of all causal pairs; num_queries: of the last ones alone."""
        T = seq_len if num_queries is None else num_queries
        return 2.0 * self.index_head_dim * self.num_kv_heads * T * (seq_len - T / 2)

    def dense_flops(self, seq_len: int) -> float:
        """Count FLOP of causal dense attention's forward; the backward has 2.5 times as many."""
        return 4.0 * self.head_dim * self.num_heads * seq_len**2 / 2

    def pair_flops(self) -> float:
        """Count FLOP of the forward of one (query, group) and one block it selected."""
        return 4.0 * self.head_dim * self.heads_per_group * self.block_size

    def kl_pair_flops(self) -> float:
        """Count FLOP of the student's scores and their two gradients, of one pair."""
        return 6.0 * self.index_head_dim * self.block_size

    def forward_bytes(self, num_pairs: int, element_bytes: int) -> float:
        """Count the bytes that the forward moves at least: a partial output per pair, written and read once.

        Queries are counted once per row, as if the cache held them while their blocks pass by; keys and
        values, once per portion of the queries, are left out.
        """
        row = self.heads_per_group * self.head_dim * element_bytes
        return num_pairs * 2.0 * row + 2.0 * row * num_pairs / self.topk

    def backward_bytes(self, num_pairs: int, element_bytes: int) -> float:
        """Count those of the backward with the KL loss: partial gradients of queries, the teacher's rows."""
        row = self.heads_per_group * self.head_dim * element_bytes
        teacher = 4.0 * self.block_size
        index = self.index_head_dim * element_bytes
        return num_pairs * 2.0 * (row + teacher + index) + 4.0 * row * num_pairs / self.topk

    def decode_bytes(self, seq_len: int, element_bytes: int, index_token_bytes: float | None = None) -> float:
        """Count the bytes that one new token must read: all index keys, K and V of the selected blocks."""
        if index_token_bytes is None:
            index_token_bytes = element_bytes * self.index_head_dim
        tokens = min(seq_len, self.topk * self.block_size) * self.num_kv_heads
        return seq_len * index_token_bytes + 2.0 * element_bytes * tokens * self.head_dim


M3 = LayerSizes()
# for the interpreter, where a tile costs milliseconds
SMOKE = LayerSizes(num_heads=4, num_kv_heads=2, head_dim=16, index_head_dim=16, block_size=16, topk=2)


class Tensors:
    """Draw random values from one seed, on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def element_bytes(self) -> int:
        """Return the bytes of one value."""
        return self.dtype.itemsize

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal values of this dtype."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)


@dataclass(slots=True)
class IndexBranch:
    """Hold index queries [S, M, Di] and keys [S, Di]."""

    q: Tensor
    k: Tensor


def make_index(
    tensors: Tensors, sizes: LayerSizes, seq_len: int, selection: str = "independent"
) -> IndexBranch:
    """Make index queries and keys of a document.

    Args:
        tensors, sizes, seq_len: device, dtype and seed; shape; tokens.
        selection: "independent": neighbouring queries choose nothing in common, which is the hardest case for
            caches; "correlated": they share about 2/3 of their blocks, as in a trained model.
    """
    q = tensors.normal(seq_len, sizes.num_kv_heads, sizes.index_head_dim)
    if selection == CORRELATED:
        runs = -(-seq_len // RUN_LENGTH)
        shared = tensors.normal(runs, sizes.num_kv_heads, sizes.index_head_dim)
        q.mul_((1 - SHARED_WEIGHT**2) ** 0.5)
        q.add_(shared.repeat_interleave(RUN_LENGTH, 0)[:seq_len], alpha=SHARED_WEIGHT)
    return IndexBranch(q, tensors.normal(seq_len, sizes.index_head_dim))


def distinct_blocks(block_indices: Tensor, neighbours: int = 4) -> float:
    """Return how many different blocks so many neighbouring queries of a group select, mean.

    Example: 2 neighbours with blocks [0, 3] and [0, 5] -> 3.

    Args:
        block_indices: [S, M, K] int32, -1 for none.
        neighbours: consecutive queries that are taken together, from the first on.
    """
    S, M, K = block_indices.shape
    # as many as fit some megabytes, from all of the sequence
    step = max(1, S // neighbours // 2**14)
    whole = block_indices[: S // neighbours * neighbours].view(-1, neighbours, M, K)[::step]
    ids = whole.transpose(1, 2).reshape(-1, neighbours * K).sort(-1).values
    changes = (ids[:, 1:] != ids[:, :-1]) & (ids[:, 1:] >= 0)
    return float((changes.sum(-1) + (ids[:, 0] >= 0)).double().mean())


def select(index: IndexBranch, sizes: LayerSizes, kernel: str, num_queries: int | None = None) -> Tensor:
    """Select blocks of every query of one document, or of the last ones: [T, M, K] int32."""
    seq_len = index.k.shape[0]
    offset = 0 if num_queries is None else seq_len - num_queries
    # document starts stay on the host, where looking at them is free
    return select_blocks(
        index.q[offset:], index.k, torch.tensor([0, seq_len]), query_offset=offset,
        block_size=sizes.block_size, topk=sizes.topk, kernel=kernel,
    )  # fmt: skip


@dataclass(slots=True)
class GroupProblem:
    """Hold attention of all queries over one pool that holds every block of `groups` KV groups."""

    queries: SparseQueries
    pool: BlockPool
    block_table: Tensor
    dout: Tensor


def make_groups(
    tensors: Tensors, sizes: LayerSizes, index: IndexBranch, block_indices: Tensor, *, with_kl: bool
) -> GroupProblem:
    """Make inputs of the first KV groups, as many as block_indices [S, groups, K] has."""
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
        block_table=torch.where(ids >= 0, ids + first, -1),
        dout=tensors.normal(S, groups, sizes.heads_per_group, D),
    )

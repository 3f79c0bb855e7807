"""Random problems of attention over pools of blocks, as plain tensors that travel to a worker."""

from dataclasses import dataclass
from typing import Any

import torch
from msa_kernels import select_blocks, window_blocks
from msa_kernels.block_sparse_attention.op import pack_blocks
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, PoolGrads, PoolOutput, SparseQueries
from msa_kernels.full_attention.op import merge_parts
from torch import Tensor

_PADDING = 3


@dataclass(slots=True)
class PoolProblem:
    """Queries of the last tokens of a pack, and its K/V in any number of pools."""

    queries: SparseQueries
    pools: list[BlockPool]
    block_tables: list[Tensor]
    dout: Tensor
    kl_weight: float = 0.25
    with_kl: bool = True
    with_kl_value: bool = True


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a problem; queries are the last `num_queries` tokens of the pack, the very last are padding.

    part_bytes, pairs_per_item, split_bytes: of the launch, 0 for its own.
    """

    seq_len: int = 64
    num_queries: int = 52
    groups: int = 2
    heads: int = 2
    dim: int = 32
    index_dim: int = 16
    block_size: int = 16
    topk: int = 2
    starts: tuple[int, ...] = (0, 16, 64)
    window: int = 0
    temperature: float = 1.0
    num_pools: int = 1
    with_index: bool = True
    part_bytes: int = 0
    pairs_per_item: int = 0
    split_bytes: int = 0
    seed: int = 0


def make_problem(shape: Shape, dtype: torch.dtype) -> PoolProblem:
    """A problem with random values; blocks of the pools in random order."""
    random = torch.Generator().manual_seed(shape.seed)
    S, T, M, NB = shape.seq_len, shape.num_queries, shape.groups, shape.seq_len // shape.block_size

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random, dtype=torch.float64).to(dtype)

    position = torch.arange(S - T, S)
    block_indices, window = _select(shape, position, normal(S, M, 8).float(), normal(S, 8).float())
    k, v = normal(S, M, shape.dim), normal(S, M, shape.dim)
    queries = SparseQueries(
        q=normal(T, M, shape.heads, shape.dim),
        position=position,
        softmax_scale=shape.dim**-0.5 * 1.5,
        q_index=normal(T, M, shape.index_dim) if shape.with_index else None,
        k_index=normal(NB, shape.block_size, shape.index_dim) if shape.with_index else None,
        index_scale=0.4,
        temperature=shape.temperature,
        window=window,
    )
    kv, blocks = pack_blocks(k, v, shape.block_size), torch.arange(NB).repeat(M)
    ids = block_indices.long()
    everywhere = torch.where(ids >= 0, ids + torch.arange(M)[:, None] * NB, -1)
    # A random pool for each (block, group), and a random place in it.
    home = torch.randint(shape.num_pools, (M * NB,), generator=random)
    order = torch.randperm(M * NB, generator=random)
    pools, block_tables = [], []
    for pool in range(shape.num_pools):
        mine = order[home[order] == pool]
        place = torch.full((M * NB + 1,), -1)
        place[mine] = torch.arange(mine.numel())
        pools.append(BlockPool(kv=kv[mine].contiguous(), block=blocks[mine]))
        block_tables.append(place[everywhere])
    return PoolProblem(
        queries, pools, block_tables, dout=normal(T, M, shape.heads, shape.dim), with_kl=shape.with_index
    )


def _select(shape: Shape, position: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Any]:
    S, T = shape.seq_len, shape.num_queries
    borders = torch.tensor(shape.starts)
    valid = torch.ones(S, dtype=torch.bool)
    valid[S - _PADDING :] = False
    if not shape.window:
        ids = select_blocks(q, k, borders, block_size=shape.block_size, topk=shape.topk, query_valid=valid)
        return ids[S - T :], None
    doc_start = borders[torch.searchsorted(borders, position, right=True) - 1]
    ids, window = window_blocks(
        position,
        doc_start,
        block_size=shape.block_size,
        num_blocks=S // shape.block_size,
        window=shape.window,
        sink_blocks=1,
        query_valid=valid[S - T :],
    )
    # One more block that lies wholly before the window, which adds nothing.
    early = (ids[:, :1] + 1).masked_fill((ids[:, :1] < 0) | (ids == ids[:, :1] + 1).any(1, True), -1)
    early = early.masked_fill((early + 1) * shape.block_size > window.start[:, None], -1)
    return torch.cat((ids, early), 1)[:, None].expand(-1, shape.groups, -1).contiguous(), window


def attend(problem: PoolProblem, kernel: str) -> PoolOutput:
    """Forward over all pools, merged by log-sum-exp."""
    total: PoolOutput | None = None
    for pool, block_table in zip(problem.pools, problem.block_tables, strict=True):
        part = pool_forward(problem.queries, pool, block_table, kernel=kernel)
        total = part if total is None else _merge(total, part)
    assert total is not None, "a problem has a pool"
    return total


def attend_backward(problem: PoolProblem, merged: PoolOutput, kernel: str) -> list[PoolGrads]:
    """Gradients over each pool, from the merged results."""
    dout = problem.dout.to(merged.out.dtype)
    delta = (dout * merged.out).sum(-1)
    term = None
    if problem.with_kl:
        assert merged.lse_index is not None, "with an index branch"
        term = KlTerm(
            merged.lse_index, problem.kl_weight, merged.lse_teacher, with_value=problem.with_kl_value
        )
    return [
        pool_backward(problem.queries, pool, block_table, dout, delta, merged.lse, term, kernel=kernel)
        for pool, block_table in zip(problem.pools, problem.block_tables, strict=True)
    ]


def assert_equal_without_value(got: list[PoolGrads], want: list[PoolGrads]) -> None:
    """Fail unless `got`, made without the KL loss's value, is otherwise `want` to the bit."""
    for ours, theirs in zip(got, want, strict=True):
        assert ours.kl is None
        assert theirs.kl is not None
        for name in ("dq", "dkv", "dq_index", "dk_index"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def to_dtype(problem: PoolProblem, dtype: torch.dtype) -> PoolProblem:
    """The same problem with its values in another dtype."""
    old = problem.queries
    queries = SparseQueries(
        q=old.q.to(dtype),
        position=old.position,
        softmax_scale=old.softmax_scale,
        q_index=None if old.q_index is None else old.q_index.to(dtype),
        k_index=None if old.k_index is None else old.k_index.to(dtype),
        index_scale=old.index_scale,
        temperature=old.temperature,
        window=old.window,
    )
    pools = [BlockPool(kv=pool.kv.to(dtype), block=pool.block) for pool in problem.pools]
    return PoolProblem(
        queries,
        pools,
        problem.block_tables,
        problem.dout.to(dtype),
        kl_weight=problem.kl_weight,
        with_kl=problem.with_kl,
        with_kl_value=problem.with_kl_value,
    )


def _merge(a: PoolOutput, b: PoolOutput) -> PoolOutput:
    out, lse = merge_parts(a.out, a.lse, b.out, b.lse)
    index, teacher = (
        None if x is None or y is None else torch.logaddexp(x, y)
        for x, y in ((a.lse_index, b.lse_index), (a.lse_teacher, b.lse_teacher))
    )
    return PoolOutput(out=out, lse=lse, lse_index=index, lse_teacher=teacher)

"""Attend to a pool of key/value blocks, forward and backward, in bounded memory.

Here the implementation is chosen; the forward in torch follows, the backward is in tiled_backward.py.

A pool is any set of blocks of KV heads: the local shard, what was fetched from other ranks, a shard that
passes by on a ring. Results over several pools merge by log-sum-exp. Work is grouped by physical block, so
that each block is read once per W queries and the products are dense matrix products.

Shapes: T queries, M KV heads, G query heads of each, R = T * M rows, K top-k slots, N physical blocks, B
block size, D head dim, Di index head dim. Sums run in fp32 (fp64 for fp64 inputs).
"""

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.across_pools import merge_outputs
from msa_kernels.block_sparse_attention.choice import implementation
from msa_kernels.block_sparse_attention.tiled_backward import backward
from msa_kernels.block_sparse_attention.tiled_chunk import Chunk, Scratch, finite, portions
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, PoolGrads, PoolOutput, SparseQueries


def pool_forward(
    queries: SparseQueries,
    pool: BlockPool,
    block_table: Tensor,
    *,
    total: PoolOutput | None = None,
    kernel: str = "auto",
) -> PoolOutput:
    """Attend with every query to its blocks of the pool.

    Args:
        queries: see SparseQueries. pool: see BlockPool. block_table: [T, M, K] int64 physical block per
        slot, -1 for none or for a block that another pool has; a
            physical block belongs to one KV head.
        total: result over other pools, to be merged with this one's; it may be overwritten. None: there is
            none.
        kernel: "auto", "triton", "cpu" or "reference", see `choice.implementation`.

    Returns:
        PoolOutput in the compute dtype. A row without blocks has out 0 and lse -inf.

    Raises:
        ValueError: on another kernel, and where "triton" cannot serve the call.
    """
    chosen = implementation(kernel, queries.q, pool.kv, queries.q_index, queries.k_index)
    if chosen is not None:
        return chosen.forward(queries, pool, block_table, total)
    part = _forward(queries, pool, block_table)
    return part if total is None else merge_outputs(total, part)


def pool_backward(
    queries: SparseQueries,
    pool: BlockPool,
    block_table: Tensor,
    dout: Tensor,
    delta: Tensor,
    lse: Tensor,
    kl_term: KlTerm | None,
    *,
    kernel: str = "auto",
) -> PoolGrads:
    """Form gradients of attention over one pool; probabilities are computed again from the merged lse.

    Args:
        queries, pool, block_table: as in the forward.
        dout: [T, M, G, D]; delta: [T, M, G] rowsum(dout * out) of the merged out; lse: [T, M, G] merged.
        kl_term: gradient of the KL loss too, as d ds = weight * (student - teacher), and its value if asked
            for; arXiv 2606.13392 and its kernels' backward. None leaves it out.
        kernel: as in the forward.

    Raises:
        ValueError: as in the forward.
    """
    chosen = implementation(kernel, queries.q, pool.kv, queries.q_index, queries.k_index)
    if chosen is not None:
        return chosen.backward(queries, pool, block_table, dout, delta, lse, kl_term)
    return backward(queries, pool, block_table, dout, delta, lse, kl_term)


def _forward(queries: SparseQueries, pool: BlockPool, block_table: Tensor) -> PoolOutput:
    """Run `pool_forward` in tiles, portion by portion."""
    T, M, G, D = queries.q.shape
    dtype = queries.compute_dtype
    out = torch.zeros(T, M, G, D, dtype=dtype, device=queries.q.device)
    lse = torch.full((T, M, G), float("-inf"), dtype=dtype, device=queries.q.device)
    lse_index = None if queries.q_index is None else torch.full_like(lse[:, :, 0], float("-inf"))
    softened = queries.q_index is not None and queries.temperature != 1.0
    lse_teacher = torch.full_like(lse, float("-inf")) if softened else None
    result = PoolOutput(out=out, lse=lse, lse_index=lse_index, lse_teacher=lse_teacher)
    scratch = Scratch()
    for chunk in portions(T, M * G * D, block_table.shape[2]):
        _forward_chunk(Chunk(queries, pool, block_table, chunk), result, chunk, scratch)
    return result


def _forward_chunk(part: Chunk, result: PoolOutput, chunk: slice, scratch: Scratch) -> None:
    """Fill in the rows of `chunk`: a softmax per (row, slot) pair over its block, then the sum of slots."""
    rows, G, D, K = part.q.shape[0], part.G, part.D, part.K
    out = part.slots(scratch, "out", G, D)
    lse = part.q.new_full((rows * K + 1, G), float("-inf"))
    lse_index = None if result.lse_index is None else torch.full_like(lse[:, 0], float("-inf"))
    lse_teacher = None if result.lse_teacher is None else torch.full_like(lse, float("-inf"))
    for work, masked in part.work():
        # pair = row * K + slot: pair 37 of 16 slots is slot 5 of row 2
        row = work.pair.clamp(min=0) // K
        target = torch.where(work.pair < 0, rows * K, work.pair)
        _, _, v, scores = part.scores(work, row, masked)
        if lse_teacher is not None:
            softened = (scores / part.queries.temperature).logsumexp(-1)
            lse_teacher[target] = softened.view(*row.shape, G)
        # the largest score is subtracted first, so that no exponential overflows
        peak = scores.amax(-1, keepdim=True)
        p = scores.sub_(peak).exp_()
        total = p.sum(-1, keepdim=True)
        out[target] = torch.bmm(p, v).div_(total).view(*row.shape, G, D)
        lse[target] = (peak + total.log()).view(*row.shape, G)
        if lse_index is not None:
            lse_index[target] = part.index_scores(work, row, masked)[2].logsumexp(-1)
    # the pair at the end is cut off here
    out, lse = out[:-1].view(rows, K, G, D), lse[:-1].view(rows, K, G)
    # Blocks are disjoint sets of keys, so slots merge like pools: lse = log sum_s e^lse_s and
    # out = sum_s e^(lse_s - lse) out_s.
    total_lse = lse.logsumexp(1)
    weight = (lse - finite(total_lse)[:, None]).exp()
    shape = (part.num_queries, part.M)
    torch.sum(out.mul_(weight.unsqueeze(-1)), dim=1, out=result.out[chunk].view(rows, G, D))
    result.lse[chunk] = total_lse.view(*shape, G)
    if result.lse_index is not None and lse_index is not None:
        result.lse_index[chunk] = lse_index[:-1].view(rows, K).logsumexp(1).view(shape)
    if result.lse_teacher is not None and lse_teacher is not None:
        result.lse_teacher[chunk] = lse_teacher[:-1].view(rows, K, G).logsumexp(1).view(*shape, G)

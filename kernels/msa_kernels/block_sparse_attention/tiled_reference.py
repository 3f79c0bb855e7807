"""Define attention over a pool plainly: every query gathers its blocks. For tests, any device and dtype.

Shapes: T queries, M KV heads, G query heads of each, K top-k slots, N physical blocks, B block size, J = K *
B tokens, D head dim, Di index head dim.
"""

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.across_pools import merge_outputs
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, PoolGrads, PoolOutput, SparseQueries


def forward(
    queries: SparseQueries, pool: BlockPool, block_table: Tensor, total: PoolOutput | None = None
) -> PoolOutput:
    """Follow `pool_forward` in the compute dtype; memory grows with T * M * K * B * D."""
    keys, values = _gather(queries, pool, block_table)
    seen = _seen(queries, pool, block_table)
    scores = _scores(queries, keys, seen)
    lse = scores.logsumexp(-1)
    out = torch.einsum("tmgj,tmjd->tmgd", (scores - _finite(lse)[..., None]).exp(), values)
    lse_index = lse_teacher = None
    if queries.q_index is not None:
        lse_index = _index_scores(queries, _index_keys(queries, pool, block_table), seen).logsumexp(-1)
        if queries.temperature != 1.0:
            lse_teacher = (scores / queries.temperature).logsumexp(-1)
    part = PoolOutput(out=out, lse=lse, lse_index=lse_index, lse_teacher=lse_teacher)
    return part if total is None else merge_outputs(total, part)


def backward(
    queries: SparseQueries,
    pool: BlockPool,
    block_table: Tensor,
    dout: Tensor,
    delta: Tensor,
    lse: Tensor,
    kl_term: KlTerm | None,
) -> PoolGrads:
    """Follow `pool_backward` in the compute dtype; memory as in `forward`."""
    dtype, scale = queries.compute_dtype, queries.softmax_scale
    keys, values = _gather(queries, pool, block_table)
    seen = _seen(queries, pool, block_table)
    scores = _scores(queries, keys, seen)
    p = (scores - _finite(lse.to(dtype))[..., None]).exp()
    dout = dout.to(dtype)
    # d softmax: p * (dp - delta), derived in tiled_backward.py
    ds = p * (torch.einsum("tmgd,tmjd->tmgj", dout, values) - delta.to(dtype)[..., None]) * scale
    dk = torch.einsum("tmgj,tmgd->tmjd", ds, queries.q.to(dtype))
    dv = torch.einsum("tmgj,tmgd->tmjd", p, dout)
    dkv = torch.stack([_scatter(part, pool, block_table) for part in (dk, dv)], dim=1)
    grads = PoolGrads(
        dq=torch.einsum("tmgj,tmjd->tmgd", ds, keys), dkv=dkv, dq_index=None, dk_index=None, kl=None
    )
    if kl_term is not None and queries.q_index is not None:
        if kl_term.lse_teacher is not None:
            # the teacher is the softmax of the scores divided by the temperature
            norm = _finite(kl_term.lse_teacher.to(dtype))[..., None]
            p = (scores / queries.temperature - norm).exp()
        _kl_backward(queries, pool, block_table, seen, p.mean(2), kl_term, grads)
    return grads


def _kl_backward(
    queries: SparseQueries,
    pool: BlockPool,
    block_table: Tensor,
    seen: Tensor,
    teacher: Tensor,
    kl_term: KlTerm,
    grads: PoolGrads,
) -> None:
    """Fill in what the KL loss adds; teacher [T, M, J]."""
    assert queries.q_index is not None, "called with an index branch only"
    dtype = teacher.dtype
    keys = _index_keys(queries, pool, block_table)
    scores = _index_scores(queries, keys, seen)
    log_student = scores - _finite(kl_term.lse_index.to(dtype))[..., None]
    # the loss's gradient by the student's scores, derived in tiled_backward.py
    ds = (log_student.exp() - teacher) * kl_term.weight * queries.index_scale
    grads.dq_index = torch.einsum("tmj,tmjd->tmd", ds, keys)
    dk = torch.einsum("tmj,tmd->tmjd", ds, queries.q_index.to(dtype))
    grads.dk_index = _scatter(dk, pool, block_table)
    if kl_term.with_value:
        cross = torch.where(teacher > 0, teacher * log_student, 0.0)
        grads.kl = (torch.xlogy(teacher, teacher) - cross).double().sum()


def _gather(queries: SparseQueries, pool: BlockPool, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """Gather keys and values [T, M, J, D] of each query's blocks; unused slots hold zeros."""
    kv = pool.kv.to(queries.compute_dtype)
    # -1 takes the last, which is zeros
    kv = torch.cat((kv, kv.new_zeros(1, *kv.shape[1:])))[block_table]
    return kv[:, :, :, 0].flatten(2, 3), kv[:, :, :, 1].flatten(2, 3)


def _seen(queries: SparseQueries, pool: BlockPool, block_table: Tensor) -> Tensor:
    """Mark the tokens of its blocks that a query sees: [T, M, J] bool."""
    block_size = pool.kv.shape[2]
    block = torch.cat((pool.block, pool.block.new_zeros(1)))[block_table]
    token = block[..., None] * block_size + torch.arange(block_size, device=block.device)
    seen = (token <= queries.position[:, None, None, None]) & (block_table >= 0)[..., None]
    if queries.window is not None:
        start, sink_stop = (
            edge[:, None, None, None] for edge in (queries.window.start, queries.window.sink_stop)
        )
        seen &= (token >= start) | (token < sink_stop)
    return seen.flatten(2)


def _scores(queries: SparseQueries, keys: Tensor, seen: Tensor) -> Tensor:
    """Form scaled scores [T, M, G, J], -inf where hidden."""
    scores = torch.einsum("tmgd,tmjd->tmgj", queries.q.to(keys.dtype), keys) * queries.softmax_scale
    return scores.masked_fill(~seen[:, :, None], float("-inf"))


def _index_keys(queries: SparseQueries, pool: BlockPool, block_table: Tensor) -> Tensor:
    """Gather index keys [T, M, J, Di] of each query's blocks."""
    assert queries.k_index is not None, "index queries come with index keys"
    block = torch.cat((pool.block, pool.block.new_zeros(1)))[block_table]
    return queries.k_index.to(queries.compute_dtype)[block].flatten(2, 3)


def _index_scores(queries: SparseQueries, keys: Tensor, seen: Tensor) -> Tensor:
    """Form scaled index scores [T, M, J], -inf where hidden."""
    assert queries.q_index is not None, "called with an index branch only"
    scores = torch.einsum("tmd,tmjd->tmj", queries.q_index.to(keys.dtype), keys) * queries.index_scale
    return scores.masked_fill(~seen, float("-inf"))


def _scatter(grad: Tensor, pool: BlockPool, block_table: Tensor) -> Tensor:
    """Sum [T, M, J, X] by physical block: [N, B, X]."""
    num_physical_blocks, block_size = pool.kv.shape[0], pool.kv.shape[2]
    # one block more takes what unused slots have, and is cut off
    total = grad.new_zeros(num_physical_blocks + 1, block_size, grad.shape[-1])
    target = torch.where(block_table >= 0, block_table, num_physical_blocks).flatten()
    total.index_add_(0, target, grad.reshape(target.numel(), block_size, -1))
    return total[:-1]


def _finite(lse: Tensor) -> Tensor:
    """Replace -inf, of rows that see nothing, by 0."""
    return lse.masked_fill(lse == float("-inf"), 0.0)

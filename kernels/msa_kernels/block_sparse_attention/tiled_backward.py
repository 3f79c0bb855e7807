"""Form gradients of attention over a pool in torch, in tiles, with those of the KL loss.

Shapes: T queries, M KV heads, G query heads of each, R rows (query, KV head) of one portion, K top-k slots, N
physical blocks, B block size, D head dim, Di index head dim, I items, W rows per item.

With p = exp(s - lse), s = scale * q . k and dp = dout . v, the softmax's gradient is ds_j = p_j (dp_j -
sum_i p_i dp_i), over all keys i of all pools. The sum needs no other pool: sum_i p_i dp_i = dout . sum_i p_i
v_i = dout . out = delta. So every pool's share follows from the merged lse and delta alone.
"""

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.tiled_chunk import Chunk, Scratch, finite, portions, rows_at
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, PoolGrads, SparseQueries
from msa_kernels.block_sparse_attention.work_list import WorkList

# Below any logarithm of a probability that a teacher above 0 can meet.
_LOG_FLOOR = -1e30


def backward(
    queries: SparseQueries,
    pool: BlockPool,
    block_table: Tensor,
    dout: Tensor,
    delta: Tensor,
    lse: Tensor,
    kl_term: KlTerm | None,
) -> PoolGrads:
    """Run `pool_backward` in tiles, portion by portion."""
    T, M, G, D = queries.q.shape
    dtype, device = queries.compute_dtype, queries.q.device
    kl_term = None if queries.q_index is None else kl_term
    # keys' and values' gradients apart: rows are added to contiguous tensors only at full speed
    dk_dv = torch.zeros(2, *pool.kv[:, 0].shape, dtype=dtype, device=device)
    grads = PoolGrads(
        dq=torch.zeros(T, M, G, D, dtype=dtype, device=device),
        # a view: a copy would be as large as all that was fetched
        dkv=dk_dv.transpose(0, 1),
        dq_index=None,
        dk_index=None,
        kl=None,
    )
    if kl_term is not None:
        assert queries.q_index is not None, "a KL term comes with index queries"
        grads.dq_index = torch.zeros(queries.q_index.shape, dtype=dtype, device=device)
        index_shape = (pool.kv.shape[0], pool.kv.shape[2], queries.q_index.shape[-1])
        grads.dk_index = torch.zeros(index_shape, dtype=dtype, device=device)
        if kl_term.with_value:
            grads.kl = torch.zeros((), dtype=torch.float64, device=device)
    scratch = Scratch()
    for chunk in portions(T, M * G * D, block_table.shape[2]):
        part = Chunk(queries, pool, block_table, chunk)
        rows = _BackwardRows(part, dout[chunk], delta[chunk], lse[chunk], kl_term, chunk)
        _backward_chunk(part, rows, grads, dk_dv, chunk, scratch)
    return grads


class _BackwardRows:
    """Hold per row (query, KV head) all that the backward needs besides the queries."""

    def __init__(
        self, part: Chunk, dout: Tensor, delta: Tensor, lse: Tensor, kl_term: KlTerm | None, chunk: slice
    ) -> None:
        self.dout = dout.to(part.dtype).flatten(0, 1)
        self.delta = delta.flatten(0, 1)
        self.lse = lse.flatten(0, 1)
        self.kl_weight = 0.0 if kl_term is None else kl_term.weight
        self.lse_index = None if kl_term is None else kl_term.lse_index[chunk].flatten(0, 1)
        self.lse_teacher = None
        if kl_term is not None and kl_term.lse_teacher is not None:
            self.lse_teacher = kl_term.lse_teacher[chunk].flatten(0, 1)


def _backward_chunk(
    part: Chunk, rows: _BackwardRows, grads: PoolGrads, dk_dv: Tensor, chunk: slice, scratch: Scratch
) -> None:
    """Fill in the rows of `chunk`, add to what is summed over queries; dk_dv: [2, N, B, D]."""
    num_rows, G, D, K = part.q.shape[0], part.G, part.D, part.K
    dq = part.slots(scratch, "dq", G, D)
    dq_index = None
    if rows.lse_index is not None and part.q_index is not None:
        dq_index = part.slots(scratch, "dq_index", part.q_index.shape[-1])
    for work, masked in part.work():
        row = work.pair.clamp(min=0) // K
        empty = work.pair < 0
        target = torch.where(empty, num_rows * K, work.pair)
        q, k, v, scores = part.scores(work, row, masked)
        # An empty place gets lse = +inf, hence probability 0 and no gradient.
        lse = rows.lse[row].masked_fill(empty[..., None], float("inf"))
        p = scores.sub_(lse.flatten(1).unsqueeze(-1)).exp_()
        dout = rows_at(rows.dout, row).flatten(1, 2)
        # ds = p * (dp - delta), see the head of this file
        ds = torch.bmm(dout, v.transpose(1, 2)).sub_(rows.delta[row].flatten(1).unsqueeze(-1)).mul_(p)
        dq[target] = torch.bmm(ds, k).view(*row.shape, G, D)
        dk_dv[0].index_add_(0, work.physical_block, torch.bmm(ds.transpose(1, 2), q))
        dk_dv[1].index_add_(0, work.physical_block, torch.bmm(p.transpose(1, 2), dout))
        if dq_index is not None:
            teacher = _teacher(part, rows, p, lse, row, empty)
            dq_index[target] = _kl_backward(part, rows, grads, work, row, masked, teacher)
    # q was scaled when it was flattened, so dk has the factor; dq, a sum over keys, gets it once here
    total = grads.dq[chunk].view(num_rows, G, D)
    torch.sum(dq[:-1].view(num_rows, K, G, D), dim=1, out=total)
    total.mul_(part.queries.softmax_scale)
    if dq_index is not None:
        assert grads.dq_index is not None, "allocated together"
        total = dq_index[:-1].view(num_rows, K, -1).sum(1).mul_(part.queries.index_scale)
        grads.dq_index[chunk] = total.view(part.num_queries, part.M, -1)


def _teacher(part: Chunk, rows: _BackwardRows, p: Tensor, lse: Tensor, row: Tensor, empty: Tensor) -> Tensor:
    """Average the probabilities at the teacher's temperature over the query heads of a KV head: [I, W, B].

    p: [I, W*G, B] at temperature 1, with lse [I, W, G]. At temperature t: s = log p + lse, and
    p_t = exp(s / t - lse_t).
    """
    heads = p.view(*row.shape, part.G, -1)
    if rows.lse_teacher is not None:
        logits = heads.log().add_(finite(lse.masked_fill(empty[..., None], 0.0))[..., None])
        norm = rows.lse_teacher[row].masked_fill(empty[..., None], float("inf"))
        heads = logits.div_(part.queries.temperature).sub_(norm[..., None]).exp_()
    return heads.mean(2)


def _kl_backward(
    part: Chunk,
    rows: _BackwardRows,
    grads: PoolGrads,
    work: WorkList,
    row: Tensor,
    masked: bool,
    teacher: Tensor,
) -> Tensor:
    """Add dk_index and, if asked for, the KL loss's value to `grads`; return dq_index [I, W, Di] unscaled.

    The loss is weight * sum_j t_j (log t_j - log s_j) with log s_j = x_j - log sum_i e^x_i, x the student's
    scores and t the teacher, a constant. Since sum_j t_j = 1, d loss / d x_j = weight * (s_j - t_j): no term
    of other blocks, so every pool and block adds its own. Example: s = (.7, .3), t = (.5, .5): ds = weight *
    (.2, -.2).
    """
    assert rows.lse_index is not None, "called with a KL term only"
    assert grads.dk_index is not None, "allocated with the KL term"
    q, k, scores = part.index_scores(work, row, masked)
    lse = rows.lse_index[row].masked_fill(work.pair < 0, float("inf"))
    log_student = scores.sub_(lse.unsqueeze(-1))
    ds = log_student.exp().sub_(teacher).mul_(rows.kl_weight)
    if grads.kl is not None:
        # Terms with teacher 0 (hidden tokens, empty places) are 0 even where the student's log is -inf.
        floor = torch.finfo(teacher.dtype).tiny
        ratio = teacher.clamp(min=floor).log_().sub_(log_student.clamp_(min=_LOG_FLOOR))
        grads.kl += torch.dot(teacher.flatten(), ratio.flatten())
    grads.dk_index.index_add_(0, work.physical_block, torch.bmm(ds.transpose(1, 2), q))
    return torch.bmm(ds, k)

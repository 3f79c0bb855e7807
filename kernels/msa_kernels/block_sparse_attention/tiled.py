"""Block-sparse attention over a pool of key/value blocks, forward and backward, in bounded memory.

A pool is any set of (block, group) pairs: the local shard, what was fetched from other ranks, a shard that
passes by on a ring. Results over several pools merge by log-sum-exp. Work is grouped by pool entry, so
that each block is read once per W queries and the products are dense matrix products.

Shapes: T queries, M KV groups, G query heads per group, R = T * M rows, K top-k slots, N pool entries,
B block size, D head dim, Di index head dim. Sums run in fp32 (fp64 for fp64 inputs).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.choice import implementation
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, PoolGrads, PoolOutput, SparseQueries
from msa_kernels.block_sparse_attention.window import TokenWindow
from msa_kernels.block_sparse_attention.work_list import WorkList, build_work_list

# Values of one score tile, which should stay near the core, and at least of the buffer that holds a partial
# result per (row, slot).
_TILE_ELEMENTS = 2**20
_SLOT_ELEMENTS = 2**25
# The buffer grows to this share of the queries: so many of them are taken at a time that each block is read
# by the same number, however long the sequence.
_SLOT_SHARE = 0.25
# Query vectors per matrix product at most: enough for its full speed, few enough to leave little of it empty
_ROWS_PER_PRODUCT = 512
# Query vectors that cost as much as an item on its own: reading the block, starting the products
_ROWS_PER_ITEM = 64
# Below any logarithm of a probability that a teacher above 0 can meet.
_LOG_FLOOR = -1e30


def pool_forward(
    queries: SparseQueries, pool: BlockPool, entries: Tensor, *, kernel: str = "auto"
) -> PoolOutput:
    """Attention of every query over its entries of the pool.

    Args:
        queries: see SparseQueries.
        pool: see BlockPool.
        entries: [T, M, K] int64 pool entry per slot, -1 for none; an entry belongs to one group.
        kernel: "auto", "triton", "cpu" or "reference", see `choice.implementation`.

    Returns:
        PoolOutput in the compute dtype. A row without entries has out 0 and lse -inf.

    Raises:
        ValueError: on another kernel, and where "triton" cannot serve the call.
    """
    chosen = implementation(kernel, queries.q, pool.kv, queries.q_index, queries.k_index)
    if chosen is not None:
        return chosen.forward(queries, pool, entries)
    return _tiled_forward(queries, pool, entries)


def _tiled_forward(queries: SparseQueries, pool: BlockPool, entries: Tensor) -> PoolOutput:
    T, M, G, D = queries.q.shape
    dtype = queries.compute_dtype
    out = torch.zeros(T, M, G, D, dtype=dtype, device=queries.q.device)
    lse = torch.full((T, M, G), float("-inf"), dtype=dtype, device=queries.q.device)
    lse_index = None if queries.q_index is None else torch.full_like(lse[:, :, 0], float("-inf"))
    softened = queries.q_index is not None and queries.temperature != 1.0
    lse_teacher = torch.full_like(lse, float("-inf")) if softened else None
    result = PoolOutput(out=out, lse=lse, lse_index=lse_index, lse_teacher=lse_teacher)
    scratch = _Scratch()
    for chunk in _chunks(T, M * G * D, entries.shape[2]):
        _forward_chunk(_Chunk(queries, pool, entries, chunk), result, chunk, scratch)
    return result


def pool_backward(
    queries: SparseQueries,
    pool: BlockPool,
    entries: Tensor,
    dout: Tensor,
    delta: Tensor,
    lse: Tensor,
    kl_term: KlTerm | None,
    *,
    kernel: str = "auto",
) -> PoolGrads:
    """Gradients of attention over one pool; probabilities are computed again from the merged lse.

    Args:
        queries, pool, entries: as in the forward.
        dout: [T, M, G, D]; delta: [T, M, G] rowsum(dout * out) of the merged out; lse: [T, M, G] merged.
        kl_term: gradient and value of the KL loss too, as d ds = weight * (student - teacher), arXiv
            2606.13392 and its kernels' backward; None leaves it out.
        kernel: as in the forward.

    Raises:
        ValueError: as in the forward.
    """
    chosen = implementation(kernel, queries.q, pool.kv, queries.q_index, queries.k_index)
    if chosen is not None:
        return chosen.backward(queries, pool, entries, dout, delta, lse, kl_term)
    return _tiled_backward(queries, pool, entries, dout, delta, lse, kl_term)


def _tiled_backward(
    queries: SparseQueries,
    pool: BlockPool,
    entries: Tensor,
    dout: Tensor,
    delta: Tensor,
    lse: Tensor,
    kl_term: KlTerm | None,
) -> PoolGrads:
    T, M, G, D = queries.q.shape
    dtype, device = queries.compute_dtype, queries.q.device
    with_kl = kl_term is not None and queries.q_index is not None
    grads = PoolGrads(
        dq=torch.zeros(T, M, G, D, dtype=dtype, device=device),
        dkv=torch.zeros(pool.kv.shape, dtype=dtype, device=device),
        dq_index=None,
        dk_index=None,
        kl=None,
    )
    if with_kl:
        assert queries.q_index is not None, "with_kl implies index queries"
        grads.dq_index = torch.zeros(queries.q_index.shape, dtype=dtype, device=device)
        index_shape = (pool.kv.shape[0], pool.kv.shape[2], queries.q_index.shape[-1])
        grads.dk_index = torch.zeros(index_shape, dtype=dtype, device=device)
        grads.kl = torch.zeros((), dtype=torch.float64, device=device)
    scratch = _Scratch()
    # keys' and values' gradients apart: rows are added to contiguous tensors only at full speed
    dk_dv = torch.zeros_like(grads.dkv).view(2, *pool.kv[:, 0].shape)
    for chunk in _chunks(T, M * G * D, entries.shape[2]):
        part = _Chunk(queries, pool, entries, chunk)
        rows = _BackwardRows(part, dout[chunk], delta[chunk], lse[chunk], kl_term if with_kl else None, chunk)
        _backward_chunk(part, rows, grads, dk_dv, chunk, scratch)
    grads.dkv = dk_dv.transpose(0, 1).contiguous()
    return grads


def _chunks(num_queries: int, elements_per_query: int, num_slots: int) -> Iterator[slice]:
    most = max(_SLOT_ELEMENTS, int(_SLOT_SHARE * num_queries * elements_per_query))
    size = max(1, most // (elements_per_query * num_slots))
    for begin in range(0, num_queries, size):
        yield slice(begin, min(begin + size, num_queries))


class _Scratch:
    """Buffers that one chunk after the other uses: new memory would be cleared by the system every time."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def empty(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of any content, valid until the next call with this name."""
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size:
            kept = self._kept[name] = like.new_empty(size)
        return kept[:size].view(shape)


class _Chunk:
    """Consecutive queries flattened to rows (query, group), with their work lists."""

    def __init__(self, queries: SparseQueries, pool: BlockPool, entries: Tensor, chunk: slice) -> None:
        self.queries, self.pool, self.dtype = queries, pool, queries.compute_dtype
        q = queries.q[chunk]
        self.num_queries, self.M, self.G, self.D = q.shape
        self.K = entries.shape[2]
        self.q = (q.to(self.dtype) * queries.softmax_scale).flatten(0, 1)
        self.q_index = None
        if queries.q_index is not None:
            self.q_index = (queries.q_index[chunk].to(self.dtype) * queries.index_scale).flatten(0, 1)
        self.position = queries.position[chunk].repeat_interleave(self.M)
        self.entries = entries[chunk].flatten(0, 1)
        self.window = None
        if queries.window is not None:
            edges = (queries.window.start[chunk], queries.window.sink_stop[chunk])
            self.window = TokenWindow(*(edge.repeat_interleave(self.M) for edge in edges))
        self.used, self.partial = self._seen()

    def _seen(self) -> tuple[Tensor, Tensor]:
        """[R, K] bool: slots that their row sees tokens of; slots whose block it sees only a part of."""
        block_size = self.pool.kv.shape[2]
        used = self.entries >= 0
        if self.pool.block.numel() == 0:
            return used, used
        block = self.pool.block[self.entries.clamp(min=0)]
        partial = block == (self.position // block_size)[:, None]
        if self.window is not None:
            begin, edge = block * block_size, self.window.start[:, None]
            cut = (begin < edge) & (begin >= self.window.sink_stop[:, None])
            used &= ~cut | (begin + block_size > edge)
            partial |= cut
        return used, partial

    def slots(self, scratch: _Scratch, name: str, *shape: int) -> Tensor:
        """[R * K + 1, *shape], 0 where nothing will be written, and one more pair at the end.

        The empty places of items write to that one.
        """
        buffer = scratch.empty(name, self.q, self.q.shape[0] * self.K + 1, *shape)
        unused = (~self.used).flatten().nonzero().squeeze(-1)
        return buffer.index_fill_(0, unused, 0)

    def work(self) -> Iterator[tuple[WorkList, bool]]:
        """Work lists with a flag: True where the query sees only a part of the block (mask needed)."""
        num_entries, block_size = self.pool.kv.shape[0], self.pool.kv.shape[2]
        if num_entries == 0:
            return
        for keep, masked in ((self.used & ~self.partial, False), (self.used & self.partial, True)):
            rows_per_item = self._rows_per_item(keep, num_entries, masked)
            work = build_work_list(self.entries, keep, num_entries=num_entries, rows_per_item=rows_per_item)
            per_batch = max(1, _TILE_ELEMENTS // (rows_per_item * self.G * block_size))
            for first in range(0, work.entry.numel(), per_batch):
                stop = first + per_batch
                yield WorkList(pair=work.pair[first:stop], entry=work.entry[first:stop]), masked

    def _rows_per_item(self, keep: Tensor, num_entries: int, masked: bool) -> int:
        """The power of 2 of least work: an entry's last item is half empty, and every item costs some more.

        With n rows per entry, (n + W / 2) * (1 + c / (W * G)) is least near W = sqrt(2 * n * c / G).
        """
        most = max(8, _ROWS_PER_PRODUCT // self.G)
        if masked:
            # the queries of the block itself, and no others
            exponent = (self.pool.kv.shape[2] - 1).bit_length()
        else:
            width = math.sqrt(2 * int(keep.sum()) / num_entries * _ROWS_PER_ITEM / self.G)
            exponent = round(math.log2(max(width, 1.0)))
        return min(most, max(8, 1 << exponent))

    def scores(self, work: WorkList, row: Tensor, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [I, W*G, D], k, v [I, B, D] and scaled scores [I, W*G, B], -inf where hidden."""
        q = _rows(self.q, row).view(row.shape[0], -1, self.D)
        kv = self.pool.kv.index_select(0, work.entry).to(self.dtype)
        scores = torch.bmm(q, kv[:, 0].transpose(1, 2))
        if masked:
            hidden = self._hidden(work, row)
            scores.view(*row.shape, self.G, -1).masked_fill_(hidden[:, :, None], float("-inf"))
        return q, kv[:, 0], kv[:, 1], scores

    def index_scores(self, work: WorkList, row: Tensor, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries [I, W, Di], index keys [I, B, Di] and scaled index scores [I, W, B]."""
        assert self.q_index is not None, "index scores need index queries"
        assert self.queries.k_index is not None, "index scores need index keys"
        q = _rows(self.q_index, row)
        k = self.queries.k_index.index_select(0, self.pool.block[work.entry]).to(self.dtype)
        scores = torch.bmm(q, k.transpose(1, 2))
        if masked:
            scores.masked_fill_(self._hidden(work, row), float("-inf"))
        return q, k, scores

    def _hidden(self, work: WorkList, row: Tensor) -> Tensor:
        """Tokens of the item's block that its rows do not see: [I, W, B] bool."""
        block_size = self.pool.kv.shape[2]
        token = torch.arange(block_size, device=row.device)
        token = self.pool.block[work.entry][:, None] * block_size + token
        token = token[:, None, :]
        hidden = token > self.position[row][:, :, None]
        if self.window is not None:
            before = token < self.window.start[row][:, :, None]
            hidden |= before & (token >= self.window.sink_stop[row][:, :, None])
        return hidden


def _forward_chunk(part: _Chunk, result: PoolOutput, chunk: slice, scratch: _Scratch) -> None:
    """Fills in the rows of `chunk`."""
    rows, G, D, K = part.q.shape[0], part.G, part.D, part.K
    out = part.slots(scratch, "out", G, D)
    lse = part.q.new_full((rows * K + 1, G), float("-inf"))
    lse_index = None if result.lse_index is None else torch.full_like(lse[:, 0], float("-inf"))
    lse_teacher = None if result.lse_teacher is None else torch.full_like(lse, float("-inf"))
    for work, masked in part.work():
        row = work.pair.clamp(min=0) // K
        target = torch.where(work.pair < 0, rows * K, work.pair)
        _, _, v, scores = part.scores(work, row, masked)
        if lse_teacher is not None:
            softened = (scores / part.queries.temperature).logsumexp(-1)
            lse_teacher[target] = softened.view(*row.shape, G)
        peak = scores.amax(-1, keepdim=True)
        p = scores.sub_(peak).exp_()
        total = p.sum(-1, keepdim=True)
        out[target] = torch.bmm(p, v).div_(total).view(*row.shape, G, D)
        lse[target] = (peak + total.log()).view(*row.shape, G)
        if lse_index is not None:
            lse_index[target] = part.index_scores(work, row, masked)[2].logsumexp(-1)
    # the pair at the end is cut off here
    out, lse = out[:-1].view(rows, K, G, D), lse[:-1].view(rows, K, G)
    total_lse = lse.logsumexp(1)
    weight = (lse - _finite(total_lse)[:, None]).exp()
    shape = (part.num_queries, part.M)
    torch.sum(out.mul_(weight.unsqueeze(-1)), dim=1, out=result.out[chunk].view(rows, G, D))
    result.lse[chunk] = total_lse.view(*shape, G)
    if result.lse_index is not None and lse_index is not None:
        result.lse_index[chunk] = lse_index[:-1].view(rows, K).logsumexp(1).view(shape)
    if result.lse_teacher is not None and lse_teacher is not None:
        result.lse_teacher[chunk] = lse_teacher[:-1].view(rows, K, G).logsumexp(1).view(*shape, G)


class _BackwardRows:
    """What the backward needs per row (query, group) besides the queries."""

    def __init__(
        self, part: _Chunk, dout: Tensor, delta: Tensor, lse: Tensor, kl_term: KlTerm | None, chunk: slice
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
    part: _Chunk, rows: _BackwardRows, grads: PoolGrads, dk_dv: Tensor, chunk: slice, scratch: _Scratch
) -> None:
    """Fills in the rows of `chunk`, adds to what is summed over queries; dk_dv: [2, N, B, D]."""
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
        dout = _rows(rows.dout, row).flatten(1, 2)
        ds = torch.bmm(dout, v.transpose(1, 2)).sub_(rows.delta[row].flatten(1).unsqueeze(-1)).mul_(p)
        dq[target] = torch.bmm(ds, k).view(*row.shape, G, D)
        dk_dv[0].index_add_(0, work.entry, torch.bmm(ds.transpose(1, 2), q))
        dk_dv[1].index_add_(0, work.entry, torch.bmm(p.transpose(1, 2), dout))
        if dq_index is not None:
            teacher = _teacher(part, rows, p, lse, row, empty)
            dq_index[target] = _kl_backward(part, rows, grads, work, row, masked, teacher)
    total = grads.dq[chunk].view(num_rows, G, D)
    torch.sum(dq[:-1].view(num_rows, K, G, D), dim=1, out=total)
    total.mul_(part.queries.softmax_scale)
    if dq_index is not None:
        assert grads.dq_index is not None, "allocated together"
        total = dq_index[:-1].view(num_rows, K, -1).sum(1).mul_(part.queries.index_scale)
        grads.dq_index[chunk] = total.view(part.num_queries, part.M, -1)


def _teacher(part: _Chunk, rows: _BackwardRows, p: Tensor, lse: Tensor, row: Tensor, empty: Tensor) -> Tensor:
    """Mean over the group's heads of the probabilities at the teacher's temperature: [I, W, B].

    p: [I, W*G, B] at temperature 1, with lse [I, W, G].
    """
    heads = p.view(*row.shape, part.G, -1)
    if rows.lse_teacher is not None:
        logits = heads.log().add_(_finite(lse.masked_fill(empty[..., None], 0.0))[..., None])
        norm = rows.lse_teacher[row].masked_fill(empty[..., None], float("inf"))
        heads = logits.div_(part.queries.temperature).sub_(norm[..., None]).exp_()
    return heads.mean(2)


def _kl_backward(
    part: _Chunk,
    rows: _BackwardRows,
    grads: PoolGrads,
    work: WorkList,
    row: Tensor,
    masked: bool,
    teacher: Tensor,
) -> Tensor:
    """Adds dk_index and the value of the KL loss to `grads`; returns dq_index [I, W, Di] unscaled."""
    assert rows.lse_index is not None, "called with a KL term only"
    assert grads.kl is not None, "allocated with the KL term"
    assert grads.dk_index is not None, "allocated with the KL term"
    q, k, scores = part.index_scores(work, row, masked)
    lse = rows.lse_index[row].masked_fill(work.pair < 0, float("inf"))
    log_student = scores.sub_(lse.unsqueeze(-1))
    ds = log_student.exp().sub_(teacher).mul_(rows.kl_weight)
    # Terms with teacher 0 (hidden tokens, empty places) are 0 even where the student's log is -inf.
    floor = torch.finfo(teacher.dtype).tiny
    ratio = teacher.clamp(min=floor).log_().sub_(log_student.clamp_(min=_LOG_FLOOR))
    grads.kl += torch.dot(teacher.flatten(), ratio.flatten())
    grads.dk_index.index_add_(0, work.entry, torch.bmm(ds.transpose(1, 2), q))
    return torch.bmm(ds, k)


def _rows(rows: Tensor, row: Tensor) -> Tensor:
    """rows [R, ...] at row [I, W]: [I, W, ...]."""
    return rows.index_select(0, row.flatten()).view(*row.shape, *rows.shape[1:])


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == float("-inf"), 0.0)

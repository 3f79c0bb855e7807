"""Launch the Triton kernels of the backward pass: torch tensors in, torch tensors out.

Imports Triton. Shapes as in launch_forward.py.
"""

from dataclasses import dataclass
from itertools import product

import torch
import triton
from torch import Tensor

from msa_kernels.block_sparse_attention import configs
from msa_kernels.block_sparse_attention.triton import backward_kernel
from msa_kernels.block_sparse_attention.triton import forward_kernel as kernel
from msa_kernels.block_sparse_attention.triton.portions import Portion, Sizes, portions, sizes_of
from msa_kernels.block_sparse_attention.triton.schedule import Items, Splits
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, PoolGrads, SparseQueries
from msa_kernels.operators import Launched
from msa_kernels.tiles import padded

# Partial gradients of the queries of one portion. More queries at a time mean that K, V and their gradients,
# 320 KiB per block and KV head of the M3 shape, travel less often per query.
BACKWARD_PART_BYTES = 2**32
# Gradients of blocks whose list was split; from this follows how long an item may be.
SPLIT_BYTES = 2**28
BACKWARD_PAIRS_PER_ITEM = 256


@dataclass(slots=True)
class _Lists:
    """Hold items of one kind, and places for split lists."""

    items: Items
    """Pairs by physical block."""
    splits: Splits
    """Places for the gradients of blocks that have several items."""
    masked: bool
    """Whether the pairs see a part of their block only."""
    add: bool
    """Whether dkv and dk_index hold sums of earlier launches."""


@dataclass(slots=True)
class _Rows:
    """Hold inputs and buffers of one portion, contiguous: R rows (query, KV head), P = R * K pairs."""

    dout: Tensor
    """[R, G, D], dtype of q."""
    delta: Tensor
    """[R, G] fp32, dout . out."""
    lse: Tensor
    """[R, G] fp32, merged over pools."""
    lse_index: Tensor | None
    """[R] fp32, of the index scores; None without a KL term."""
    lse_teacher: Tensor | None
    """[R, G] fp32, at the teacher's temperature; None where that is 1."""
    dq_part: Tensor
    """[P, G, D], dtype of q: gradients of queries by pair."""
    teacher_part: Tensor | None
    """[P, B] fp32, the teacher's probabilities by pair; None without a KL term."""
    kl_weight: float
    """Factor of the KL loss."""


def backward(
    queries: SparseQueries,
    pool: BlockPool,
    block_table: Tensor,
    dout: Tensor,
    delta: Tensor,
    lse: Tensor,
    kl_term: KlTerm | None,
) -> PoolGrads:
    """Run `pool_backward` by Triton kernels; dtypes as in the forward, dout rounded to that of q."""
    if not queries.softmax_scale > 0.0:
        raise ValueError(f"softmax_scale={queries.softmax_scale}: must be above 0, the kernels divide by it")
    kl_term = None if queries.q_index is None else kl_term
    grads = _allocate(queries, pool, block_table, kl_term)
    if pool.kv.shape[0] == 0 or block_table.numel() == 0:
        return grads
    sizes = sizes_of(queries, pool, block_table)
    kv_block_bytes = sizes.kv_block_bytes
    if kl_term is not None:
        kv_block_bytes += 4 * sizes.B + sizes.index_dim * sizes.element_bytes
    for chunk, portion in portions(queries, pool, block_table, BACKWARD_PART_BYTES // kv_block_bytes):
        # named by nobody: buffers of one portion, 2 GiB for M3, must be gone before the next has its own
        _backward_portion(
            portion,
            _rows(portion, dout[chunk], delta[chunk], lse[chunk], kl_term, chunk),
            grads,
            chunk,
        )
    return grads


def output_delta(dout: Tensor, out: Tensor) -> Tensor:
    """Run `across_pools.output_delta` by a Triton kernel."""
    dout, out = dout.contiguous(), out.contiguous()
    delta = torch.empty(out.shape[:-1], device=out.device)
    dim, num_rows = out.shape[-1], delta.numel()
    if num_rows == 0:
        return delta
    rows = max(1, configs.DELTA_VALUES // padded(dim))
    Launched(backward_kernel.output_delta_kernel)[(triton.cdiv(num_rows, rows),)](
        dout, out, delta, num_rows, D=dim, DP=padded(dim), ROWS=rows, num_warps=4
    )
    return delta


def _allocate(
    queries: SparseQueries, pool: BlockPool, block_table: Tensor, kl_term: KlTerm | None
) -> PoolGrads:
    """Allocate gradients: the first portion writes every value; zeros where there is nothing to compute."""
    N, _, B, _ = pool.kv.shape
    new = torch.zeros if N == 0 or block_table.numel() == 0 else torch.empty
    device = queries.q.device
    grads = PoolGrads(
        dq=new(queries.q.shape, device=device),
        dkv=new(pool.kv.shape, device=device),
        dq_index=None,
        dk_index=None,
        kl=None,
    )
    if kl_term is not None:
        assert queries.q_index is not None, "a KL term comes with index queries"
        grads.dq_index = new(queries.q_index.shape, device=device)
        grads.dk_index = new((N, B, queries.q_index.shape[-1]), device=device)
        if kl_term.with_value:
            grads.kl = torch.zeros((), dtype=torch.float64, device=device)
    return grads


def _rows(
    portion: Portion, dout: Tensor, delta: Tensor, lse: Tensor, kl_term: KlTerm | None, chunk: slice
) -> _Rows:
    """Bring the rows of `chunk` into the layout of the kernels, and allocate their buffers."""
    q, sizes, pairs = portion.queries.q, portion.sizes, portion.num_pairs
    rows = _Rows(
        dout=dout.to(q.dtype).contiguous(),
        delta=delta.float().contiguous(),
        lse=lse.float().contiguous(),
        lse_index=None,
        lse_teacher=None,
        dq_part=q.new_empty(pairs, sizes.G, sizes.D),
        teacher_part=None,
        kl_weight=0.0,
    )
    if kl_term is not None:
        rows.lse_index = kl_term.lse_index[chunk].float().contiguous()
        if kl_term.lse_teacher is not None:
            rows.lse_teacher = kl_term.lse_teacher[chunk].float().contiguous()
        rows.teacher_part = torch.empty(pairs, sizes.B, device=q.device)
        rows.kl_weight = kl_term.weight
    return rows


def _backward_portion(portion: Portion, rows: _Rows, grads: PoolGrads, chunk: slice) -> None:
    """Fill in dq of `chunk`; write (first portion) or add to the gradients of blocks."""
    sizes, first = portion.sizes, chunk.start == 0
    split_bytes = 4 * sizes.B * max(2 * sizes.D, sizes.index_dim)
    # A split list has at most twice as many parts as full items fit into it: of 257 pairs, 256 per item, 2
    # parts.
    longest = triton.cdiv(2 * portion.num_pairs, max(1, SPLIT_BYTES // split_bytes))
    longest = max(longest, BACKWARD_PAIRS_PER_ITEM)
    # The first launch of all also writes the zeros of blocks that nobody reads.
    whole, partial = portion.schedule.items(pairs_per_item=longest, every_block=first)
    lists = [
        _Lists(whole, whole.splits(), masked=False, add=not first),
        _Lists(partial, partial.splits(), masked=True, add=True),
    ]
    # A list of n > longest pairs has at most 2 n / longest parts, so all of them together have 2 P / longest.
    num_splits = max(1, 2 * portion.num_pairs // longest)
    dkv_part = grads.dkv.new_empty(num_splits, *grads.dkv.shape[1:])
    for part in lists:
        _attend_backward(portion, rows, part, grads.dkv, dkv_part)
        _add_splits(part, dkv_part, grads.dkv)
    # up to SPLIT_BYTES, which the KL loss's parts may take again
    del dkv_part
    _add_slots(portion, rows.dq_part, grads.dq[chunk], portion.queries.softmax_scale)
    if rows.teacher_part is not None:
        _kl_portion(portion, rows, grads, chunk, lists, num_splits)


def _kl_portion(
    portion: Portion, rows: _Rows, grads: PoolGrads, chunk: slice, lists: list[_Lists], num_splits: int
) -> None:
    """Do the same for the index branch, from the teacher that the attention's backward has left."""
    assert grads.dq_index is not None, "allocated with the KL term"
    assert grads.dk_index is not None, "allocated with the KL term"
    q_index = portion.queries.q_index
    assert q_index is not None, "a KL term comes with index queries"
    scale = rows.kl_weight * portion.queries.index_scale
    dq_part = q_index.new_empty(portion.num_pairs, portion.sizes.index_dim)
    dk_part = grads.dk_index.new_empty(num_splits, *grads.dk_index.shape[1:])
    for part in lists:
        _kl_backward(portion, rows, part, dq_part, grads, dk_part)
        _add_splits(part, dk_part, grads.dk_index)
    _add_slots(portion, dq_part, grads.dq_index[chunk], scale)


def _attend_backward(portion: Portion, rows: _Rows, part: _Lists, dkv: Tensor, dkv_part: Tensor) -> None:
    """Form gradients of K and V, partial gradients of queries and the teacher, of all pairs of one kind."""
    sizes, queries = portion.sizes, portion.queries
    crowded = sizes.are_padded or rows.lse_teacher is not None or queries.window is not None
    table = configs.ATTEND_BACKWARD_NARROW if crowded else configs.ATTEND_BACKWARD
    config = sizes.config(table, split=True)
    constants = portion.constants(masked=part.masked) | sizes.shape
    constants["BP"] = min(constants["BP"], config.max_block)
    unused = rows.lse
    # dV first: its launch also leaves the teacher, and dq is formed beside dK
    halves = ((False, True), (True, False)) if config.separate else ((True, True),)
    for first_key, (with_dk, with_dv) in product(range(0, sizes.B, constants["BP"]), halves):
        Launched(backward_kernel.attend_backward_kernel)[(part.items.physical_block.numel(),)](
            queries.q,
            rows.dout,
            rows.lse,
            rows.delta,
            unused if rows.lse_teacher is None else rows.lse_teacher,
            portion.pool.kv,
            portion.pool.block,
            *portion.visibility,
            *portion.work(part.items),
            part.splits.of_item,
            rows.dq_part,
            unused if rows.teacher_part is None else rows.teacher_part,
            dkv,
            dkv_part,
            queries.softmax_scale,
            -1.0 / queries.softmax_scale,
            queries.softmax_scale * kernel.LOG2E.value,
            1.0 / queries.temperature,
            first_key,
            **constants,
            ROWS=config.rows,
            WITH_TEACHER=with_dv and rows.teacher_part is not None,
            SOFTENED=rows.lse_teacher is not None,
            ADD=part.add,
            ADD_DQ=first_key > 0,
            WITH_DK=with_dk,
            WITH_DV=with_dv,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
        )


def _kl_backward(
    portion: Portion,
    rows: _Rows,
    part: _Lists,
    dq_part: Tensor,
    grads: PoolGrads,
    dk_part: Tensor,
) -> None:
    """Form gradients and, if asked for, the value of the KL loss, of all pairs of one kind."""
    num_items = part.items.physical_block.numel()
    sizes, queries = portion.sizes, portion.queries
    config = sizes.config(configs.KL_BACKWARD, index=True, split=True)
    if sizes.are_padded or config.max_block < sizes.B or queries.window is not None:
        config = sizes.config(configs.KL_BACKWARD_NARROW, index=True, split=True)
    constants = portion.constants(masked=part.masked)
    constants["BP"] = min(constants["BP"], config.max_block)
    for first_key in range(0, sizes.B, constants["BP"]):
        # Items that are not there stay 0. Without a value: looked at by nobody.
        kl_part = rows.lse if grads.kl is None else dk_part.new_zeros(num_items)
        Launched(backward_kernel.kl_backward_kernel)[(num_items,)](
            queries.q_index,
            queries.k_index,
            rows.lse_index,
            rows.teacher_part,
            portion.pool.block,
            *portion.visibility,
            *portion.work(part.items),
            part.splits.of_item,
            dq_part,
            kl_part,
            grads.dk_index,
            dk_part,
            rows.kl_weight * queries.index_scale,
            queries.index_scale * kernel.LOG2E.value,
            first_key,
            **constants,
            D=sizes.index_dim,
            DP=padded(sizes.index_dim),
            ROWS=config.rows,
            WITH_VALUE=grads.kl is not None,
            ADD=part.add,
            ADD_DQ=first_key > 0,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
        )
        if grads.kl is not None:
            grads.kl += kl_part.sum(dtype=torch.float64)


def _add_splits(part: _Lists, parts: Tensor, total: Tensor) -> None:
    """Add parts of split lists [splits, ...] into total [N, ...]."""
    size, chunk = total[0].numel(), configs.ADD_SPLITS_CHUNK
    Launched(backward_kernel.add_splits_kernel)[(total.shape[0], triton.cdiv(size, chunk))](
        parts,
        part.splits.first,
        part.splits.count,
        total,
        size,
        ADD=part.add,
        CHUNK=chunk,
        num_warps=4,
    )


def _add_slots(portion: Portion, parts: Tensor, total: Tensor, scale: float) -> None:
    """Add parts of pairs [P, ...] into total [T, M, ...], times scale."""
    sizes: Sizes = portion.sizes
    num_rows, size = portion.num_pairs // sizes.K, parts[0].numel()
    chunk = min(triton.next_power_of_2(size), configs.ADD_SLOTS_CHUNK)
    rows = configs.ADD_SLOTS_TILE // chunk
    Launched(backward_kernel.add_slots_kernel)[(triton.cdiv(num_rows, rows), triton.cdiv(size, chunk))](
        portion.schedule.used,
        parts,
        total,
        num_rows,
        scale,
        size,
        K=sizes.K,
        ROWS=rows,
        CHUNK=chunk,
        STAGES=configs.COMBINE_STAGES,
        num_warps=4,
    )

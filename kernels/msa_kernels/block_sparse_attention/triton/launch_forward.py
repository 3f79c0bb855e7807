"""Launch the Triton kernels of the forward pass: torch tensors in, torch tensors out.

Imports Triton. Shapes: T queries, M KV heads, G query heads of each, K top-k slots, N physical blocks, B
block size, D head dim, Di index head dim. A pair is a (row, slot) pair, a row (query, KV head).
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from msa_kernels.block_sparse_attention import configs
from msa_kernels.block_sparse_attention.triton import forward_kernel as kernel
from msa_kernels.block_sparse_attention.triton.launch_union import UnionWork, attend_union, find_union
from msa_kernels.block_sparse_attention.triton.portions import Portion, portions, sizes_of
from msa_kernels.block_sparse_attention.triton.schedule import Items
from msa_kernels.block_sparse_attention.types import BlockPool, PoolOutput, SparseQueries
from msa_kernels.operators import Launched
from msa_kernels.tiles import padded

# Partial results of one portion of the queries. 2 GiB hold 8,192 queries of the M3 shape in bf16: their q of
# one KV head, 32 MiB, still fits the L2 cache, where it is read once per slot.
FORWARD_PART_BYTES = 2**31
# An item of the forward reads its block once; longer lists are split so that all processors have work.
FORWARD_PAIRS_PER_ITEM = 64
INDEX_PAIRS_PER_ITEM = 256


def forward(
    queries: SparseQueries, pool: BlockPool, block_table: Tensor, total: PoolOutput | None = None
) -> PoolOutput:
    """Run `pool_forward` by Triton kernels; q, kv, q_index and k_index of one dtype, fp32, fp16 or bf16.

    Merging costs the rows that have a block in this pool, and so, over the pools of a ring however many, at
    most as much as a merge for every pair; `total` is overwritten.
    """
    if not queries.softmax_scale > 0.0:
        raise ValueError(
            f"softmax_scale={queries.softmax_scale}: must be above 0, the kernels scale the largest product"
        )
    if pool.kv.shape[0] == 0 or block_table.numel() == 0:
        if total is not None:
            return total
        result = _allocate(queries)
        result.out.zero_()
        for lse in (result.lse, result.lse_index, result.lse_teacher):
            if lse is not None:
                lse.fill_(float("-inf"))
        return result
    result = _allocate(queries) if total is None else total
    max_pairs = FORWARD_PART_BYTES // sizes_of(queries, pool, block_table).kv_block_bytes
    for chunk, portion in portions(queries, pool, block_table, max_pairs):
        _forward_portion(portion, result, chunk, merge=total is not None)
    return result


def _allocate(queries: SparseQueries) -> PoolOutput:
    """Allocate the result, every row of which `combine_kernel` writes."""
    T, M, G, D = queries.q.shape
    device, indexed = queries.q.device, queries.q_index is not None
    lse = torch.empty(T, M, G, device=device)
    return PoolOutput(
        out=torch.empty(T, M, G, D, device=device),
        lse=lse,
        lse_index=torch.empty(T, M, device=device) if indexed else None,
        lse_teacher=torch.empty_like(lse) if indexed and queries.temperature != 1.0 else None,
    )


def _forward_portion(portion: Portion, result: PoolOutput, chunk: slice, *, merge: bool) -> None:
    """Fill in the rows of `chunk`, or merge with them: partial results of all pairs, then over slots."""
    sizes, queries = portion.sizes, portion.queries
    softened, indexed = result.lse_teacher is not None, result.lse_index is not None
    pairs = portion.num_pairs
    out_part = queries.q.new_empty(pairs, sizes.G, sizes.D)
    lse_part = result.lse.new_empty(pairs, sizes.G)
    teacher_part = torch.empty_like(lse_part) if softened else lse_part
    index_part = result.lse.new_empty(pairs) if indexed else lse_part
    union = find_union(portion)
    # whole blocks without masks first, then the few that a query sees a part of
    for masked, items in enumerate(portion.schedule.items(pairs_per_item=FORWARD_PAIRS_PER_ITEM)):
        _attend(portion, items, bool(masked), out_part, lse_part, teacher_part, softened, union)
    if indexed:
        for masked, items in enumerate(portion.schedule.items(pairs_per_item=INDEX_PAIRS_PER_ITEM)):
            _index_lse(portion, items, bool(masked), index_part)
    if union is not None:
        attend_union(portion, union, result, chunk, merge=merge)
    out, lse = result.out[chunk], result.lse[chunk]
    # a tile takes whole queries, whatever their heads: (row, query head) rows, GP to a query
    rows = max(configs.COMBINE_ROWS, triton.next_power_of_2(sizes.G))
    num_rows = out.shape[0] * sizes.M
    per_program = rows // triton.next_power_of_2(sizes.G)
    Launched(kernel.combine_kernel)[(triton.cdiv(num_rows, per_program),)](
        portion.schedule.used,
        out_part,
        lse_part,
        teacher_part,
        index_part,
        out,
        lse,
        lse if result.lse_teacher is None else result.lse_teacher[chunk],
        lse if result.lse_index is None else result.lse_index[chunk],
        portion.schedule.used if union is None else union.chosen,
        num_rows,
        K=sizes.K,
        KP=triton.next_power_of_2(sizes.K),
        **sizes.shape,
        ROWS=rows,
        SOFTENED=softened,
        INDEXED=indexed,
        OR_UNION=union is not None,
        MERGE=merge,
        STAGES=configs.COMBINE_STAGES,
        num_warps=4,
    )


def _attend(
    portion: Portion,
    items: Items,
    masked: bool,
    out_part: Tensor,
    lse_part: Tensor,
    teacher_part: Tensor,
    softened: bool,
    union: UnionWork | None,
) -> None:
    """Form partial outputs and log-sum-exps of all pairs of one kind, unless `union` was chosen."""
    sizes, queries = portion.sizes, portion.queries
    config = sizes.config(configs.ATTEND)
    if union is not None:
        # none are left where the other kernel was chosen: programs end at once
        items = replace(items, num_items=items.num_items * (1 - union.chosen))
    Launched(kernel.attend_kernel)[(items.physical_block.numel(),)](
        queries.q,
        portion.pool.kv,
        portion.pool.block,
        *portion.visibility,
        *portion.work(items),
        out_part,
        lse_part,
        teacher_part,
        queries.softmax_scale * kernel.LOG2E.value,
        1.0 / queries.temperature,
        **portion.constants(masked=masked),
        **sizes.shape,
        ROWS=config.rows,
        SOFTENED=softened,
        num_warps=config.num_warps,
    )


def _index_lse(portion: Portion, items: Items, masked: bool, index_part: Tensor) -> None:
    """Take the log-sum-exp of the index scores of all pairs of one kind."""
    sizes, queries = portion.sizes, portion.queries
    assert queries.q_index is not None, "called with an index branch only"
    assert queries.k_index is not None, "index queries come with index keys"
    config = sizes.config(configs.INDEX_LSE, index=True)
    Launched(kernel.index_lse_kernel)[(items.physical_block.numel(),)](
        queries.q_index,
        queries.k_index,
        portion.pool.block,
        *portion.visibility,
        *portion.work(items),
        index_part,
        queries.index_scale * kernel.LOG2E.value,
        **portion.constants(masked=masked),
        D=sizes.index_dim,
        DP=padded(sizes.index_dim),
        ROWS=config.rows,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )

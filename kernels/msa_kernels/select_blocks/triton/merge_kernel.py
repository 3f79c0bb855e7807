"""Triton kernel that takes the best of few candidates: of the parts of a divided range, or of all blocks."""

import triton
import triton.language as tl

from msa_kernels.select_blocks.triton.rows_kernel import (
    LN2,
    NO_BLOCK,
    add_exp,
    forced_blocks,
    store_ascending,
    visible_blocks,
)


@triton.jit
def merge_kernel(
    partial_score_ptr,
    partial_id_ptr,
    cu_seqlens_ptr,
    position_ptr,
    valid_ptr,
    out_ptr,
    lse_ptr,
    partial_total_ptr,
    forced_lse_ptr,
    scale_log2,
    num_rows,
    num_docs,
    search_steps,
    query_offset,
    num_candidates,
    NUM_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CANDIDATES: tl.constexpr,
    ID_IS_COLUMN: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    """Best of each row's candidates, beside its forced blocks: partials [num_rows, num_candidates] -> out.

    Takes the best candidate TOPK times, of equal ones that with the lowest id; no order is asked of them.
    ID_IS_COLUMN: a candidate's id is its column, and partial_id is not read. WITH_LSE: lse [num_rows] of the
    chosen ones, see `select_blocks_kernel`.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, own, _ = visible_blocks(
        rows, num_rows, cu_seqlens_ptr, num_docs, search_steps, position_ptr, valid_ptr, query_offset,
        NUM_GROUPS, BLOCK_SIZE, HAS_POSITION, HAS_VALID,
    )  # fmt: skip
    candidate = tl.arange(0, CANDIDATES)[None, :]
    source = rows.to(tl.int64)[:, None] * num_candidates + candidate
    inside = (rows < num_rows)[:, None] & (candidate < num_candidates)
    scores = tl.load(partial_score_ptr + source, inside, float("-inf"))
    if ID_IS_COLUMN:
        ids = tl.broadcast_to(candidate, [BLOCK_M, CANDIDATES])
    else:
        ids = tl.load(partial_id_ptr + source, inside, NO_BLOCK)
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = forced_blocks(first[:, None], own[:, None], slot, LOCAL_BLOCKS)
    filled = tl.sum((chosen != NO_BLOCK).to(tl.int32), axis=1)
    if WITH_LSE:
        totals = tl.load(partial_total_ptr + source, inside, 0.0)
        forced_lse = tl.load(forced_lse_ptr + rows, rows < num_rows, float("-inf"))
        taken = tl.zeros([BLOCK_M, CANDIDATES], tl.int1)
        all_scores = scores
    for _ in range(TOPK):
        top = tl.max(scores, axis=1)
        block = tl.min(tl.where(scores == top[:, None], ids, NO_BLOCK), axis=1)
        found = (top > float("-inf")) & (filled < TOPK)
        chosen = tl.where((slot == filled[:, None]) & found[:, None], block[:, None], chosen)
        filled += found.to(tl.int32)
        if WITH_LSE:
            taken |= (ids == block[:, None]) & (scores == top[:, None]) & found[:, None]
        scores = tl.where(ids == block[:, None], float("-inf"), scores)
    if WITH_LSE:
        block_lse = tl.where(taken, all_scores * scale_log2 + tl.log2(totals), float("-inf"))
        ones = tl.zeros([BLOCK_M], tl.float32) + 1.0
        peak, total = add_exp(forced_lse, ones, block_lse)
        # 2^-inf is 0, and so is what a row without forced blocks began with
        tl.store(lse_ptr + rows, (peak + tl.log2(total)) * LN2, rows < num_rows)
    store_ascending(out_ptr, tl.trans(chosen), rows, num_rows, TOPK, SLOTS)

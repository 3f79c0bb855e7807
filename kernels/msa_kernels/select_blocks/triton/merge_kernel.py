"""Take the best of few candidates: of the parts of a divided range, or of all blocks.

Shapes: R rows (query, KV head), C candidates per row, K top-k slots. KP holds K, CP holds C. Prefixes: o_
offsets, m_ masks, p_ pointers, b_ tiles.
"""

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


# as in score_kernel.py
@triton.jit(do_not_specialize=["num_rows", "num_docs", "search_steps", "query_offset"])
def merge_kernel(
    score_part,  # [R, C] fp32
    id_part,  # [R, C] int32; not read with ID_IS_COLUMN
    cu_seqlens,  # [num_docs + 1] int32 or int64
    position,  # [T] int32 or int64
    valid,  # [T] int8
    out,  # [R, K] int32
    lse,  # [R] fp32
    total_part,  # [R, C] fp32
    forced_lse,  # [R] fp32, log2
    scale_log2,
    num_rows,
    num_docs,
    search_steps,
    query_offset,
    num_candidates,
    M: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_VALID: tl.constexpr,
    ROWS: tl.constexpr,
    CP: tl.constexpr,
    ID_IS_COLUMN: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    """Take the best of each row's candidates, beside its forced blocks.

    Takes the best candidate K times, of equal ones that with the lowest id; no order is asked of them.
    ID_IS_COLUMN: a candidate's id is its column. WITH_LSE: also the log-sum-exp over the chosen ones, see
    `select_blocks_kernel`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, own, _ = visible_blocks(
        row, num_rows, cu_seqlens, num_docs, search_steps, position, valid, query_offset,
        M, B, HAS_POSITION, HAS_VALID,
    )  # fmt: skip
    o_c = tl.arange(0, CP)[None, :]
    o_part = row.to(tl.int64)[:, None] * num_candidates + o_c
    m_part = (row < num_rows)[:, None] & (o_c < num_candidates)
    b_s = tl.load(score_part + o_part, m_part, float("-inf"))
    if ID_IS_COLUMN:
        b_id = tl.broadcast_to(o_c, [ROWS, CP])
    else:
        b_id = tl.load(id_part + o_part, m_part, NO_BLOCK)
    o_slot = tl.arange(0, KP)[None, :]
    b_chosen = forced_blocks(first[:, None], own[:, None], o_slot, LOCAL_BLOCKS)
    filled = tl.sum((b_chosen != NO_BLOCK).to(tl.int32), axis=1)
    if WITH_LSE:
        b_total = tl.load(total_part + o_part, m_part, 0.0)
        b_forced = tl.load(forced_lse + row, row < num_rows, float("-inf"))
        m_taken = tl.zeros([ROWS, CP], tl.int1)
        b_all = b_s
    for _ in range(K):
        top = tl.max(b_s, axis=1)
        block = tl.min(tl.where(b_s == top[:, None], b_id, NO_BLOCK), axis=1)
        found = (top > float("-inf")) & (filled < K)
        b_chosen = tl.where((o_slot == filled[:, None]) & found[:, None], block[:, None], b_chosen)
        filled += found.to(tl.int32)
        if WITH_LSE:
            m_taken |= (b_id == block[:, None]) & (b_s == top[:, None]) & found[:, None]
        b_s = tl.where(b_id == block[:, None], float("-inf"), b_s)
    if WITH_LSE:
        # lse of a block = its score + log2 of its sum of 2^(score of a token - score of the block)
        b_lse = tl.where(m_taken, b_all * scale_log2 + tl.log2(b_total), float("-inf"))
        ones = tl.zeros([ROWS], tl.float32) + 1.0
        peak, total = add_exp(b_forced, ones, b_lse)
        # 2^-inf is 0, and so is what a row without forced blocks began with
        tl.store(lse + row, (peak + tl.log2(total)) * LN2, row < num_rows)
    store_ascending(out, tl.trans(b_chosen), row, num_rows, K, KP)

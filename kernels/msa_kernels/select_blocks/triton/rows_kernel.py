"""What scoring and merging share: blocks that a row sees or must take, sums of exponentials, the result."""

import triton
import triton.language as tl

NO_BLOCK = tl.constexpr(2**31 - 1)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visible_blocks(
    rows,
    num_rows,
    cu_seqlens_ptr,
    num_docs,
    search_steps,
    position_ptr,
    valid_ptr,
    query_offset,
    NUM_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """First block of each row's document, its own block, its position; 0, -1 for a row that selects nothing.

    Positions are query_offset + query, or query_offset + position[query].
    """
    query = rows // NUM_GROUPS
    is_query = rows < num_rows
    position = query.to(tl.int64)
    if HAS_POSITION:
        position = tl.load(position_ptr + query, is_query, 0).to(tl.int64)
    position += query_offset
    is_query &= position >= 0
    # the last document that starts at or before the position
    low = tl.zeros_like(position)
    high = low + num_docs
    for _ in range(search_steps):
        middle = (low + high) // 2
        starts_before = tl.load(cu_seqlens_ptr + middle, middle > low, 0) <= position
        low, high = tl.where(starts_before, middle, low), tl.where(starts_before, high, middle)
    if HAS_VALID:
        is_query &= tl.load(valid_ptr + query, is_query, 0) != 0
    # the first document starts at 0: with one document nothing is read
    first = (tl.load(cu_seqlens_ptr + low, is_query & (low > 0), 0) // BLOCK_SIZE).to(tl.int32)
    own = (position // BLOCK_SIZE).to(tl.int32)
    return tl.where(is_query, first, 0), tl.where(is_query, own, -1), position


@triton.jit
def forced_blocks(first, own, slot, LOCAL_BLOCKS: tl.constexpr):
    """Forced block of each (row, slot) whose first and own blocks and slot broadcast, NO_BLOCK for none."""
    block = own - slot
    return tl.where((slot < LOCAL_BLOCKS) & (block >= first), block, NO_BLOCK)


@triton.jit
def add_exp(peak, total, scores):
    """Running sum of powers of two: total * 2^peak [BLOCK_M] and the sum of 2^scores over the last dim."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    # nothing so far: -inf - -inf would not be 0
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), axis=1)
    return new_peak, total


@triton.jit
def store_ascending(out_ptr, ids, rows, num_rows, TOPK: tl.constexpr, SLOTS: tl.constexpr):
    """Write ids [SLOTS, BLOCK_M] (NO_BLOCK: empty) to out [num_rows, TOPK], ascending, -1 on the right.

    Each id goes to the place that the number of smaller ones says; empty slots keep their order.
    """
    slot = tl.arange(0, SLOTS)[:, None]
    place = tl.zeros_like(ids)
    for j in range(SLOTS):
        other = tl.max(tl.where(slot == j, ids, -1), axis=0)[None, :]
        place += ((other < ids) | ((other == ids) & (j < slot))).to(tl.int32)
    target = out_ptr + rows.to(tl.int64)[None, :] * TOPK + place
    tl.store(target, tl.where(ids == NO_BLOCK, -1, ids), (rows < num_rows)[None, :] & (place < TOPK))

"""Serve scoring and merging: a row's visible and forced blocks, sums of exponentials, the result.

Shapes: T queries, M KV heads, R = T * M rows (query, KV head), B block size, K top-k slots, KP the power of
two that holds K. Prefixes as in the other kernels: o_ offsets, m_ masks, p_ pointers, b_ tiles.
"""

import triton
import triton.language as tl

NO_BLOCK = tl.constexpr(2**31 - 1)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visible_blocks(
    row,  # [ROWS] int32
    num_rows,
    cu_seqlens,  # [num_docs + 1] int32 or int64
    num_docs,
    search_steps,
    position,  # [T] int32 or int64, read with HAS_POSITION
    valid,  # [T] int8, read with HAS_VALID
    query_offset,
    M: tl.constexpr,
    B: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Find each row's first and last visible block and its token; 0 and -1 for a row that selects nothing.

    The first block is that of the row's document, the last one the query's own. Tokens are query_offset +
    query, or query_offset + position[query]. search_steps halvings find one of num_docs documents.

    Example (M 2, B 4, documents from 0, 8, 20): row 19 is query 9 of token 9, in the document from 8 on: its
    first and own block are both 2.
    """
    query = row // M
    m_query = row < num_rows
    token = query.to(tl.int64)
    if HAS_POSITION:
        token = tl.load(position + query, m_query, 0).to(tl.int64)
    token += query_offset
    m_query &= token >= 0
    # the last document that starts at or before the token
    low = tl.zeros_like(token)
    high = low + num_docs
    for _ in range(search_steps):
        middle = (low + high) // 2
        starts_before = tl.load(cu_seqlens + middle, middle > low, 0) <= token
        low, high = tl.where(starts_before, middle, low), tl.where(starts_before, high, middle)
    if HAS_VALID:
        m_query &= tl.load(valid + query, m_query, 0) != 0
    # the first document starts at 0: with one document nothing is read
    first = (tl.load(cu_seqlens + low, m_query & (low > 0), 0) // B).to(tl.int32)
    own = (token // B).to(tl.int32)
    return tl.where(m_query, first, 0), tl.where(m_query, own, -1), token


@triton.jit
def forced_blocks(first, own, o_slot, LOCAL_BLOCKS: tl.constexpr):
    """Give the forced block of each (row, slot), NO_BLOCK for none; first, own and o_slot broadcast.

    Example (LOCAL_BLOCKS 2, first 4, own 4): slot 0 has block 4; slot 1 would have 3, of another document.
    """
    block = own - o_slot
    return tl.where((o_slot < LOCAL_BLOCKS) & (block >= first), block, NO_BLOCK)


@triton.jit
def add_exp(peak, total, b_s):
    """Add 2^b_s, summed over the last dim, to a running sum total * 2^peak [ROWS]."""
    new_peak = tl.maximum(peak, tl.max(b_s, axis=1))
    # nothing so far: -inf - -inf would not be 0
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(b_s - base[:, None]), axis=1)
    return new_peak, total


@triton.jit
def store_ascending(
    out,  # [R, K] int32
    b_id,  # [KP, ROWS] int32, NO_BLOCK where empty
    row,
    num_rows,
    K: tl.constexpr,
    KP: tl.constexpr,
):
    """Write each row's ids in ascending order, -1 on the right.

    An id goes to the place that the number of smaller ones says; empty slots keep their order. Example: ids
    7, NO_BLOCK, 2 have 1, 2, 0 smaller ones: 2, 7, -1.
    """
    o_slot = tl.arange(0, KP)[:, None]
    place = tl.zeros_like(b_id)
    for j in range(KP):
        other = tl.max(tl.where(o_slot == j, b_id, -1), axis=0)[None, :]
        place += ((other < b_id) | ((other == b_id) & (j < o_slot))).to(tl.int32)
    p_out = out + row.to(tl.int64)[None, :] * K + place
    tl.store(p_out, tl.where(b_id == NO_BLOCK, -1, b_id), (row < num_rows)[None, :] & (place < K))

"""Triton kernels of block selection: scores stay in registers, only block ids leave.

Rows are (query, group) pairs: row r of the [T, M, D] queries seen as [T * M, D]. A program owns BLOCK_M rows
and walks the keys in tiles of whole blocks. The best blocks of its rows lie in registers as [SLOTS, BLOCK_M]:
with the slots along the first dim and as many threads as rows, each thread holds all slots of one row, and a
reduction over slots costs no exchange.
"""

import triton
import triton.language as tl

NO_BLOCK = tl.constexpr(2**31 - 1)


@triton.jit
def _insert(best, ids, score, block):
    """Put `block` with `score` [BLOCK_M] in the place of each row's worst slot, if it beats that.

    best [SLOTS, BLOCK_M] fp32, ids [SLOTS, BLOCK_M] int32, no id twice in a row. Blocks come in ascending
    order: a later one must be strictly better, and of equally bad slots the one with the highest id goes. So
    ties go to the lower id. Example (2 slots): scores 3, 5, 5, 5 of blocks 0 1 2 3 leave blocks 1 and 2.
    """
    worst = tl.min(best, axis=0)
    last = tl.max(tl.where(best == worst[None, :], ids, -NO_BLOCK), axis=0)
    # compared in two dims: a one-dim comparison would move to the slots' threads on its own
    score = score[None, :]
    taken = (ids == last[None, :]) & (score > best)
    return tl.where(taken, score, best), tl.where(taken, block, ids)


@triton.jit
def _store_ascending(out_ptr, ids, rows, num_rows, TOPK: tl.constexpr, SLOTS: tl.constexpr):
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


@triton.jit
def _visible_blocks(
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
    """First block of each row's document, and its own block; (0, -1) for a row that selects nothing.

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
    return tl.where(is_query, first, 0), tl.where(is_query, own, -1)


@triton.jit
def _forced(first, own, slot, LOCAL_BLOCKS: tl.constexpr):
    """Forced block of each (row, slot) whose first and own blocks and slot broadcast, NO_BLOCK for none."""
    block = own - slot
    return tl.where((slot < LOCAL_BLOCKS) & (block >= first), block, NO_BLOCK)


@triton.jit
def select_blocks_kernel(
    q_desc,
    k_desc,
    cu_seqlens_ptr,
    position_ptr,
    valid_ptr,
    out_ptr,
    partial_score_ptr,
    partial_id_ptr,
    num_rows,
    num_docs,
    search_steps,
    query_offset,
    num_splits,
    NUM_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SPLIT: tl.constexpr,
    TEST_FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid [tiles of rows * num_splits]. q_desc [num_rows, D], k_desc [S, D]; out [num_rows, TOPK] int32.

    SPLIT: each program walks one of num_splits parts of its tile's range and writes its best blocks to
    partial_score and partial_id [num_rows, num_splits * SLOTS]; `merge_kernel` makes the result of them.
    TILE_N keys per step: TILE_BLOCKS blocks, or one block and padding.
    """
    program = tl.program_id(0)
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    split = program // num_tiles
    # the last rows see most keys: longest first leaves no long program for the end
    tile = num_tiles - 1 - program % num_tiles
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first, own = _visible_blocks(
        rows, num_rows, cu_seqlens_ptr, num_docs, search_steps, position_ptr, valid_ptr, query_offset,
        NUM_GROUPS, BLOCK_SIZE, HAS_POSITION, HAS_VALID,
    )  # fmt: skip
    # forced blocks are never scored, and what lies before them is visible to its last token: no token masks
    limit = own - LOCAL_BLOCKS
    slot = tl.arange(0, SLOTS)[:, None]
    zeros = tl.zeros([SLOTS, BLOCK_M], tl.int32)
    if SPLIT:
        ids = zeros - 1 - slot
        best = tl.where(zeros + slot < TOPK, float("-inf"), float("inf"))
    else:
        forced = _forced(first[None, :], own[None, :], zeros + slot, LOCAL_BLOCKS)
        ids = tl.where((forced == NO_BLOCK) & (slot < TOPK), -1 - slot, forced)
        best = tl.where((forced == NO_BLOCK) & (slot < TOPK), float("-inf"), float("inf"))
    sees_any = first <= limit
    begin = tl.min(tl.where(sees_any, first, NO_BLOCK), axis=0)
    end = tl.max(tl.where(sees_any, limit + 1, 0), axis=0)
    if SPLIT:
        length = tl.cdiv(tl.maximum(end - begin, 0), num_splits * TILE_BLOCKS) * TILE_BLOCKS
        begin = begin + split * length
        end = tl.minimum(end, begin + length)
    if begin < end:
        q = q_desc.load([tile * BLOCK_M, 0])
        cursor = begin
        # one turn per document that the rows see: those between are skipped
        while cursor < end:
            ahead = tl.where(sees_any & (limit >= cursor), tl.maximum(first, cursor), NO_BLOCK)
            start = tl.min(ahead, axis=0)
            stop = tl.minimum(tl.max(tl.where(first <= start, limit + 1, 0), axis=0), end)
            for block in tl.range(start, stop, TILE_BLOCKS, num_stages=NUM_STAGES):
                if NUM_CHUNKS == 1:
                    k = k_desc.load([block * BLOCK_SIZE, 0])
                    scores = tl.dot(q, tl.trans(k))
                else:
                    scores = tl.zeros([BLOCK_M, TILE_N], tl.float32)
                    for chunk in tl.range(0, NUM_CHUNKS, num_stages=NUM_STAGES):
                        q = q_desc.load([tile * BLOCK_M, chunk * CHUNK])
                        k = k_desc.load([block * BLOCK_SIZE, chunk * CHUNK])
                        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
                if TILE_BLOCKS == 1:
                    if TILE_N > BLOCK_SIZE:
                        scores = tl.where((tl.arange(0, TILE_N) < BLOCK_SIZE)[None, :], scores, float("-inf"))
                    score = tl.max(scores, axis=1)
                    score = tl.where((block >= first) & (block <= limit), score, float("-inf"))
                    if TEST_FIRST:
                        if tl.max((score > tl.min(best, axis=0)).to(tl.int32), axis=0) != 0:
                            best, ids = _insert(best, ids, score, block)
                    else:
                        best, ids = _insert(best, ids, score, block)
                else:
                    per_block = tl.max(tl.reshape(scores, [BLOCK_M, TILE_BLOCKS, BLOCK_SIZE]), axis=2)
                    column = tl.arange(0, TILE_BLOCKS)[None, :]
                    for j in tl.static_range(TILE_BLOCKS):
                        score = tl.max(tl.where(column == j, per_block, float("-inf")), axis=1)
                        seen = (block + j >= first) & (block + j <= limit) & (block + j < stop)
                        score = tl.where(seen, score, float("-inf"))
                        best, ids = _insert(best, ids, score, block + j)
            cursor = tl.maximum(stop, start)
    if SPLIT:
        target = rows.to(tl.int64)[None, :] * (num_splits * SLOTS) + split * SLOTS + slot
        is_row = (rows < num_rows)[None, :] & (slot >= 0)
        tl.store(partial_score_ptr + target, tl.where(slot < TOPK, best, float("-inf")), is_row)
        tl.store(partial_id_ptr + target, ids, is_row)
    else:
        ids = tl.where((best == float("-inf")) | (slot >= TOPK), NO_BLOCK, ids)
        _store_ascending(out_ptr, ids, rows, num_rows, TOPK, SLOTS)


@triton.jit
def merge_kernel(
    partial_score_ptr,
    partial_id_ptr,
    cu_seqlens_ptr,
    position_ptr,
    valid_ptr,
    out_ptr,
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
):
    """Best of each row's candidates, beside its forced blocks: partials [num_rows, num_candidates] -> out.

    Takes the best candidate TOPK times, of equal ones that with the lowest id; no order is asked of them.
    ID_IS_COLUMN: a candidate's id is its column, and partial_id is not read.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, own = _visible_blocks(
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
    chosen = _forced(first[:, None], own[:, None], slot, LOCAL_BLOCKS)
    filled = tl.sum((chosen != NO_BLOCK).to(tl.int32), axis=1)
    for _ in range(TOPK):
        top = tl.max(scores, axis=1)
        block = tl.min(tl.where(scores == top[:, None], ids, NO_BLOCK), axis=1)
        found = (top > float("-inf")) & (filled < TOPK)
        chosen = tl.where((slot == filled[:, None]) & found[:, None], block[:, None], chosen)
        filled += found.to(tl.int32)
        scores = tl.where(ids == block[:, None], float("-inf"), scores)
    _store_ascending(out_ptr, tl.trans(chosen), rows, num_rows, TOPK, SLOTS)

"""Triton kernels of block selection: scores stay in registers, only block ids leave.

Rows are (query, group) pairs: row r of the [T, M, D] queries seen as [T * M, D]. A program owns BLOCK_M rows
and walks the keys in tiles of whole blocks. The best blocks of its rows lie in registers as [SLOTS, BLOCK_M]:
with the slots along the first dim and as many threads as rows, each thread holds all slots of one row, and a
reduction over slots costs no exchange.
"""

import triton
import triton.language as tl

NO_BLOCK = tl.constexpr(2**31 - 1)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _insert(best, ids, totals, score, block, total, WITH_LSE: tl.constexpr):
    """Put `block` with `score` [BLOCK_M] in the place of each row's worst slot, if it beats that.

    best [SLOTS, BLOCK_M] fp32, ids [SLOTS, BLOCK_M] int32, no id twice in a row. Blocks come in ascending
    order: a later one must be strictly better, and of equally bad slots the one with the highest id goes. So
    ties go to the lower id. Example (2 slots): scores 3, 5, 5, 5 of blocks 0 1 2 3 leave blocks 1 and 2.
    WITH_LSE: the block's `total` [BLOCK_M] goes to the same place of totals [SLOTS, BLOCK_M].
    """
    worst = tl.min(best, axis=0)
    last = tl.max(tl.where(best == worst[None, :], ids, -NO_BLOCK), axis=0)
    # compared in two dims: a one-dim comparison would move to the slots' threads on its own
    score = score[None, :]
    taken = (ids == last[None, :]) & (score > best)
    if WITH_LSE:
        totals = tl.where(taken, total[None, :], totals)
    return tl.where(taken, score, best), tl.where(taken, block, ids), totals


@triton.jit
def _add_exp(peak, total, scores):
    """Running sum of powers of two: total * 2^peak [BLOCK_M] and the sum of 2^scores over the last dim."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    # nothing so far: -inf - -inf would not be 0
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), axis=1)
    return new_peak, total


@triton.jit
def _scores(
    q_desc,
    k_desc,
    q,
    row,
    key,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Products of rows from `row` and keys from `key` on: [BLOCK_M, TILE_N] fp32; q: rows, if one chunk."""
    if NUM_CHUNKS == 1:
        return tl.dot(q, tl.trans(k_desc.load([key, 0])), input_precision="ieee")
    else:
        scores = tl.zeros([BLOCK_M, TILE_N], tl.float32)
        for chunk in tl.range(0, NUM_CHUNKS, num_stages=NUM_STAGES):
            q = q_desc.load([row, chunk * CHUNK])
            k = k_desc.load([key, chunk * CHUNK])
            scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
        return scores


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
    lse_ptr,
    partial_total_ptr,
    forced_lse_ptr,
    scale_log2,
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
    WITH_LSE: tl.constexpr,
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

    WITH_LSE: also lse [num_rows] fp32, natural log of the sum of exp(scale * score) over the tokens of the
    chosen blocks up to the row's position; scale_log2 = scale * log2(e). Beside each kept block is its sum
    of 2^(scale_log2 * (score - block score)). SPLIT: these in partial_total, like partial_score, and the lse
    of the forced blocks, in powers of two, in forced_lse [num_rows].
    """
    program = tl.program_id(0)
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    split = program // num_tiles
    # the last rows see most keys: longest first leaves no long program for the end
    tile = num_tiles - 1 - program % num_tiles
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first, own, position = _visible_blocks(
        rows, num_rows, cu_seqlens_ptr, num_docs, search_steps, position_ptr, valid_ptr, query_offset,
        NUM_GROUPS, BLOCK_SIZE, HAS_POSITION, HAS_VALID,
    )  # fmt: skip
    # forced blocks are never ranked, and what lies before them is visible to its last token: no token masks
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
    totals = tl.zeros([SLOTS, BLOCK_M], tl.float32)
    sees_any = first <= limit
    begin = tl.min(tl.where(sees_any, first, NO_BLOCK), axis=0)
    end = tl.max(tl.where(sees_any, limit + 1, 0), axis=0)
    if SPLIT:
        length = tl.cdiv(tl.maximum(end - begin, 0), num_splits * TILE_BLOCKS) * TILE_BLOCKS
        begin = begin + split * length
        end = tl.minimum(end, begin + length)
    q = q_desc.load([tile * BLOCK_M, 0])
    if begin < end:
        cursor = begin
        # one turn per document that the rows see: those between are skipped
        while cursor < end:
            ahead = tl.where(sees_any & (limit >= cursor), tl.maximum(first, cursor), NO_BLOCK)
            start = tl.min(ahead, axis=0)
            stop = tl.minimum(tl.max(tl.where(first <= start, limit + 1, 0), axis=0), end)
            for block in tl.range(start, stop, TILE_BLOCKS, num_stages=NUM_STAGES):
                scores = _scores(
                    q_desc, k_desc, q, tile * BLOCK_M, block * BLOCK_SIZE,
                    CHUNK, NUM_CHUNKS, BLOCK_M, TILE_N, NUM_STAGES,
                )  # fmt: skip
                if TILE_BLOCKS == 1:
                    if TILE_N > BLOCK_SIZE:
                        scores = tl.where((tl.arange(0, TILE_N) < BLOCK_SIZE)[None, :], scores, float("-inf"))
                    highest = tl.max(scores, axis=1)
                    score = tl.where((block >= first) & (block <= limit), highest, float("-inf"))
                    if TEST_FIRST:
                        if tl.max((score > tl.min(best, axis=0)).to(tl.int32), axis=0) != 0:
                            total = score
                            if WITH_LSE:
                                total = tl.sum(tl.exp2((scores - highest[:, None]) * scale_log2), axis=1)
                            best, ids, totals = _insert(best, ids, totals, score, block, total, WITH_LSE)
                    else:
                        best, ids, totals = _insert(best, ids, totals, score, block, score, False)
                else:
                    scores = tl.reshape(scores, [BLOCK_M, TILE_BLOCKS, BLOCK_SIZE])
                    per_block = tl.max(scores, axis=2)
                    block_totals = per_block
                    if WITH_LSE:
                        block_totals = tl.sum(tl.exp2((scores - per_block[:, :, None]) * scale_log2), axis=2)
                    column = tl.arange(0, TILE_BLOCKS)[None, :]
                    for j in tl.static_range(TILE_BLOCKS):
                        score = tl.max(tl.where(column == j, per_block, float("-inf")), axis=1)
                        seen = (block + j >= first) & (block + j <= limit) & (block + j < stop)
                        score = tl.where(seen, score, float("-inf"))
                        total = score
                        if WITH_LSE:
                            total = tl.sum(tl.where(column == j, block_totals, 0.0), axis=1)
                        best, ids, totals = _insert(best, ids, totals, score, block + j, total, WITH_LSE)
            cursor = tl.maximum(stop, start)
    if WITH_LSE:
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        # forced blocks of the rows: few where positions are consecutive, and one split's work
        if split == 0:
            last = position.to(tl.int32)
            begin_forced = tl.maximum(first, own - LOCAL_BLOCKS + 1)
            cursor = tl.min(tl.where(own >= 0, begin_forced, NO_BLOCK), axis=0)
            while cursor < NO_BLOCK:
                scores = _scores(
                    q_desc, k_desc, q, tile * BLOCK_M, cursor * BLOCK_SIZE,
                    CHUNK, NUM_CHUNKS, BLOCK_M, TILE_N, NUM_STAGES,
                )  # fmt: skip
                token = cursor * BLOCK_SIZE + tl.arange(0, TILE_N)
                inside = token < (cursor + TILE_BLOCKS) * BLOCK_SIZE
                seen = (token[None, :] >= (begin_forced * BLOCK_SIZE)[:, None]) & inside[None, :]
                seen &= (token[None, :] <= last[:, None]) & (own >= 0)[:, None]
                scores = tl.where(seen, scores * scale_log2, float("-inf"))
                peak, total = _add_exp(peak, total, scores)
                ahead = tl.maximum(begin_forced, cursor + TILE_BLOCKS)
                cursor = tl.min(tl.where(own >= cursor + TILE_BLOCKS, ahead, NO_BLOCK), axis=0)
    if SPLIT:
        target = rows.to(tl.int64)[None, :] * (num_splits * SLOTS) + split * SLOTS + slot
        is_row = (rows < num_rows)[None, :] & (slot >= 0)
        tl.store(partial_score_ptr + target, tl.where(slot < TOPK, best, float("-inf")), is_row)
        tl.store(partial_id_ptr + target, ids, is_row)
        if WITH_LSE:
            tl.store(partial_total_ptr + target, totals, is_row)
            if split == 0:
                tl.store(forced_lse_ptr + rows, peak + tl.log2(total), rows < num_rows)
    else:
        if WITH_LSE:
            # a forced block's slot has +inf, an empty one -inf
            is_scored = (tl.abs(best) != float("inf")) & (slot < TOPK)
            block_lse = tl.where(is_scored, best * scale_log2 + tl.log2(totals), float("-inf"))
            peak, total = _add_exp(peak, total, tl.trans(block_lse))
            tl.store(lse_ptr + rows, (peak + tl.log2(total)) * LN2, rows < num_rows)
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
    first, own, _ = _visible_blocks(
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
        peak, total = _add_exp(forced_lse, ones, block_lse)
        # 2^-inf is 0, and so is what a row without forced blocks began with
        tl.store(lse_ptr + rows, (peak + tl.log2(total)) * LN2, rows < num_rows)
    _store_ascending(out_ptr, tl.trans(chosen), rows, num_rows, TOPK, SLOTS)

"""Triton kernels of block selection: scores stay in registers, only block ids leave.

Rows are (query, group) pairs: row r of the [T, M, D] queries seen as [T * M, D]. A program owns BLOCK_M rows
and walks the keys in tiles of whole blocks. The best blocks of its rows lie in registers as [SLOTS, BLOCK_M]:
with the slots along the first dim and as many threads as rows, each thread holds all slots of one row, and a
reduction over slots costs no exchange.
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


@triton.jit
def _insert(best, ids, totals, score, block, total, WITH_LSE: tl.constexpr):
    """Put `block` with `score` [1, BLOCK_M] in the place of each row's worst slot, if it beats that.

    best [SLOTS, BLOCK_M] fp32, ids [SLOTS, BLOCK_M] int32, no id twice in a row. Blocks come in ascending
    order: a later one must be strictly better, and of equally bad slots the one with the highest id goes. So
    ties go to the lower id. Example (2 slots): scores 3, 5, 5, 5 of blocks 0 1 2 3 leave blocks 1 and 2.
    WITH_LSE: the block's `total` [BLOCK_M] goes to the same place of totals [SLOTS, BLOCK_M].
    """
    worst = tl.min(best, axis=0)
    last = tl.max(tl.where(best == worst[None, :], ids, -NO_BLOCK), axis=0)
    taken = (ids == last[None, :]) & (score > best)
    if WITH_LSE:
        totals = tl.where(taken, total[None, :], totals)
    return tl.where(taken, score, best), tl.where(taken, block, ids), totals


@triton.jit
def _rank(
    best,
    ids,
    totals,
    scores,
    highest,
    first,
    limit,
    block,
    scale_log2,
    TEST_FIRST: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    """`_insert` one block, of largest score `highest` [BLOCK_M], in the rows whose first..limit holds it.

    scores [BLOCK_M, TILE_N]: of the block's tokens, for its total. TEST_FIRST, which WITH_LSE asks for: only
    where some row takes the block.
    """
    # compared in two dims, where the slots are: a one-dim comparison would move there on its own
    score = tl.where(((block >= first) & (block <= limit))[None, :], highest[None, :], float("-inf"))
    if TEST_FIRST:
        if tl.max(tl.max((score > tl.min(best, axis=0)[None, :]).to(tl.int32), axis=1), axis=0) != 0:
            total = highest
            if WITH_LSE:
                total = tl.sum(tl.exp2((scores - highest[:, None]) * scale_log2), axis=1)
            best, ids, totals = _insert(best, ids, totals, score, block, total, WITH_LSE)
    else:
        best, ids, totals = _insert(best, ids, totals, score, block, highest, False)
    return best, ids, totals


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
    PARTS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid [tiles of rows * num_splits]. q_desc [num_rows, D], k_desc [S, D]; out [num_rows, TOPK] int32.

    SPLIT: each program walks one of num_splits parts of its tile's range and writes its best blocks to
    partial_score and partial_id [num_rows, num_splits * SLOTS]; `merge_kernel` makes the result of them.
    TILE_N keys per step: TILE_BLOCKS blocks, or one block and padding, or one of PARTS equal parts of a
    block, whose largest score is carried from step to step (not with WITH_LSE).

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
    first, own, position = visible_blocks(
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
        forced = forced_blocks(first[None, :], own[None, :], zeros + slot, LOCAL_BLOCKS)
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
            if PARTS > 1:
                so_far = tl.full([BLOCK_M], float("-inf"), tl.float32)
            # disable_licm: descriptors of the rows' tile would be kept in registers, 8 to 28 per thread
            for step in tl.range(
                start * PARTS, stop * PARTS, TILE_BLOCKS, num_stages=NUM_STAGES, disable_licm=True
            ):
                block = step // PARTS
                scores = _scores(
                    q_desc, k_desc, q, tile * BLOCK_M, step * (BLOCK_SIZE // PARTS),
                    CHUNK, NUM_CHUNKS, BLOCK_M, TILE_N, NUM_STAGES,
                )  # fmt: skip
                if TILE_BLOCKS == 1:
                    if TILE_N > BLOCK_SIZE:
                        scores = tl.where((tl.arange(0, TILE_N) < BLOCK_SIZE)[None, :], scores, float("-inf"))
                    highest = tl.max(scores, axis=1)
                    if PARTS == 1:
                        best, ids, totals = _rank(
                            best,
                            ids,
                            totals,
                            scores,
                            highest,
                            first,
                            limit,
                            block,
                            scale_log2,
                            TEST_FIRST,
                            WITH_LSE,
                        )
                    else:
                        so_far = tl.maximum(so_far, highest)
                        if step % PARTS == PARTS - 1:
                            best, ids, totals = _rank(
                                best,
                                ids,
                                totals,
                                scores,
                                so_far,
                                first,
                                limit,
                                block,
                                scale_log2,
                                TEST_FIRST,
                                False,
                            )
                            so_far = tl.full([BLOCK_M], float("-inf"), tl.float32)
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
                        best, ids, totals = _insert(
                            best, ids, totals, score[None, :], block + j, total, WITH_LSE
                        )
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
                peak, total = add_exp(peak, total, scores)
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
            peak, total = add_exp(peak, total, tl.trans(block_lse))
            tl.store(lse_ptr + rows, (peak + tl.log2(total)) * LN2, rows < num_rows)
        ids = tl.where((best == float("-inf")) | (slot >= TOPK), NO_BLOCK, ids)
        store_ascending(out_ptr, ids, rows, num_rows, TOPK, SLOTS)

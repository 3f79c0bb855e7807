"""Score key blocks and keep the best: scores stay in registers, only block ids leave.

Shapes: T queries, M KV heads, R = T * M rows, S keys, D index head dim, B block size, K top-k slots, KP the
power of two that holds K. Row r is KV head r % M of query r // M: the [T, M, D] queries seen as [R, D].
Prefixes: o_ offsets, m_ masks, p_ pointers, b_ tiles.

A program owns ROWS rows and walks the keys in tiles of KEYS. The best blocks of its rows lie in registers as
[KP, ROWS]: with the slots along the first dim and as many threads as rows, each thread holds all slots of one
row, and a reduction over slots costs no exchange.
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
def insert_block(b_best, b_id, b_total, b_score, block, total, WITH_LSE: tl.constexpr):
    """Put `block` with b_score [1, ROWS] in the place of each row's worst slot, if it beats that.

    b_best [KP, ROWS] fp32, b_id [KP, ROWS] int32, no id twice in a row. Blocks come in ascending order: a
    later one must be strictly better, and of equally bad slots the one with the highest id goes. So ties go
    to the lower id. WITH_LSE: the block's `total` [ROWS] goes to the same place of b_total [KP, ROWS].

    Example (2 slots): scores 3, 5, 5, 5 of blocks 0, 1, 2, 3 leave blocks 1 and 2.
    """
    worst = tl.min(b_best, axis=0)
    last = tl.max(tl.where(b_best == worst[None, :], b_id, -NO_BLOCK), axis=0)
    m_taken = (b_id == last[None, :]) & (b_score > b_best)
    if WITH_LSE:
        b_total = tl.where(m_taken, total[None, :], b_total)
    return tl.where(m_taken, b_score, b_best), tl.where(m_taken, block, b_id), b_total


@triton.jit
def rank_block(
    b_best, b_id, b_total, b_s, highest, first, limit, block, scale_log2,
    TEST_FIRST: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """Insert one block, of largest score `highest` [ROWS], in the rows whose first..limit holds it.

    b_s [ROWS, KEYS]: scores of the block's tokens, for its total. TEST_FIRST, which WITH_LSE asks for: only
    where some row takes the block.
    """
    # compared in two dims, where the slots are: a one-dim comparison would move there on its own
    b_score = tl.where(((block >= first) & (block <= limit))[None, :], highest[None, :], float("-inf"))
    if TEST_FIRST:
        if tl.max(tl.max((b_score > tl.min(b_best, axis=0)[None, :]).to(tl.int32), axis=1), axis=0) != 0:
            total = highest
            if WITH_LSE:
                total = tl.sum(tl.exp2((b_s - highest[:, None]) * scale_log2), axis=1)
            b_best, b_id, b_total = insert_block(b_best, b_id, b_total, b_score, block, total, WITH_LSE)
    else:
        b_best, b_id, b_total = insert_block(b_best, b_id, b_total, b_score, block, highest, False)
    return b_best, b_id, b_total


@triton.jit
def key_scores(
    q_desc, k_desc, b_q, first_row, first_key,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Multiply rows with KEYS keys from `first_key` on: [ROWS, KEYS] fp32; b_q: the rows, if one chunk."""
    if NUM_CHUNKS == 1:
        return tl.dot(b_q, tl.trans(k_desc.load([first_key, 0])), input_precision="ieee")
    else:
        b_s = tl.zeros([ROWS, KEYS], tl.float32)
        for chunk in tl.range(0, NUM_CHUNKS, num_stages=STAGES):
            b_q = q_desc.load([first_row, chunk * CHUNK])
            b_k = k_desc.load([first_key, chunk * CHUNK])
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
        return b_s


# What changes from step to step is not specialised: how many documents a pack has, and how many queries are
# sampled. Triton would compile the kernel anew for a multiple of 16, for another number and for 1.
@triton.jit(do_not_specialize=["num_rows", "num_docs", "search_steps", "query_offset", "num_splits"])
def select_blocks_kernel(
    q_desc,  # [R, D], tiles [ROWS, CHUNK]
    k_desc,  # [S, D], tiles [KEYS, CHUNK], dtype of q_desc
    key_scale,  # [S + KEYS] fp32, read with FP8
    cu_seqlens,  # [num_docs + 1] int32 or int64
    position,  # [T] int32 or int64, read with HAS_POSITION
    valid,  # [T] int8, read with HAS_VALID
    out,  # [R, K] int32
    score_part,  # [R, num_splits, KP] fp32, this and the next with SPLIT
    id_part,  # [R, num_splits, KP] int32
    lse,  # [R] fp32, this and the next two with WITH_LSE
    total_part,  # [R, num_splits, KP] fp32
    forced_lse,  # [R] fp32, log2
    scale_log2,
    num_rows,
    num_docs,
    search_steps,
    query_offset,
    num_splits,
    M: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SPLIT: tl.constexpr,
    WITH_LSE: tl.constexpr,
    TEST_FIRST: tl.constexpr,
    FP8: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Select blocks for one tile of rows; grid [tiles of rows * num_splits].

    SPLIT: each program walks one of num_splits parts of its tile's range and writes its best blocks to
    score_part and id_part; `merge_kernel` makes the result of them.
    KEYS per step: TILE_BLOCKS blocks, or one block and padding, or one of PARTS equal parts of a block, whose
    largest score is carried from step to step (not with WITH_LSE).

    WITH_LSE: also lse, the natural log of the sum of exp(scale * score) over the tokens of the chosen blocks
    up to the row's own; scale_log2 = scale * log2(e). Beside each kept block is its sum of 2^(scale_log2 *
    (score - block score)). SPLIT: these in total_part, and the lse of the forced blocks, in powers of two,
    in forced_lse.
    """
    program = tl.program_id(0)
    num_tiles = tl.cdiv(num_rows, ROWS)
    split = program // num_tiles
    # the last rows see most keys: longest first leaves no long program for the end
    tile = num_tiles - 1 - program % num_tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    first, own, token = visible_blocks(
        row, num_rows, cu_seqlens, num_docs, search_steps, position, valid, query_offset,
        M, B, HAS_POSITION, HAS_VALID,
    )  # fmt: skip
    # forced blocks are never ranked, and what lies before them is visible to its last token: no token masks
    limit = own - LOCAL_BLOCKS
    o_slot = tl.arange(0, KP)[:, None]
    b_zero = tl.zeros([KP, ROWS], tl.int32)
    # An empty slot has score -inf and an id of its own below 0; one that is taken, or beyond K, has +inf,
    # which no score beats.
    if SPLIT:
        b_id = b_zero - 1 - o_slot
        b_best = tl.where(b_zero + o_slot < K, float("-inf"), float("inf"))
    else:
        b_forced = forced_blocks(first[None, :], own[None, :], b_zero + o_slot, LOCAL_BLOCKS)
        b_id = tl.where((b_forced == NO_BLOCK) & (o_slot < K), -1 - o_slot, b_forced)
        b_best = tl.where((b_forced == NO_BLOCK) & (o_slot < K), float("-inf"), float("inf"))
    b_total = tl.zeros([KP, ROWS], tl.float32)
    sees_any = first <= limit
    begin = tl.min(tl.where(sees_any, first, NO_BLOCK), axis=0)
    end = tl.max(tl.where(sees_any, limit + 1, 0), axis=0)
    if SPLIT:
        # equal parts of whole tiles; of a short range the last programs get none
        length = tl.cdiv(tl.maximum(end - begin, 0), num_splits * TILE_BLOCKS) * TILE_BLOCKS
        begin = begin + split * length
        end = tl.minimum(end, begin + length)
    b_q = q_desc.load([tile * ROWS, 0])
    if begin < end:
        cursor = begin
        # one turn per document that the rows see: those between are skipped
        while cursor < end:
            ahead = tl.where(sees_any & (limit >= cursor), tl.maximum(first, cursor), NO_BLOCK)
            start = tl.min(ahead, axis=0)
            stop = tl.minimum(tl.max(tl.where(first <= start, limit + 1, 0), axis=0), end)
            if PARTS > 1:
                so_far = tl.full([ROWS], float("-inf"), tl.float32)
            # disable_licm: descriptors of the rows' tile would be kept in registers, 8 to 28 per thread
            for step in tl.range(
                start * PARTS, stop * PARTS, TILE_BLOCKS, num_stages=STAGES, disable_licm=True
            ):
                block = step // PARTS
                b_s = key_scores(
                    q_desc,
                    k_desc,
                    b_q,
                    tile * ROWS,
                    step * (B // PARTS),
                    CHUNK,
                    NUM_CHUNKS,
                    ROWS,
                    KEYS,
                    STAGES,
                )
                if FP8:
                    o_scale = step * (B // PARTS) + tl.arange(0, KEYS)
                    b_s *= tl.load(key_scale + o_scale)[None, :]
                if TILE_BLOCKS == 1:
                    if KEYS > B:
                        b_s = tl.where((tl.arange(0, KEYS) < B)[None, :], b_s, float("-inf"))
                    highest = tl.max(b_s, axis=1)
                    if PARTS == 1:
                        b_best, b_id, b_total = rank_block(
                            b_best, b_id, b_total, b_s, highest, first, limit, block, scale_log2,
                            TEST_FIRST, WITH_LSE,
                        )  # fmt: skip
                    else:
                        so_far = tl.maximum(so_far, highest)
                        if step % PARTS == PARTS - 1:
                            b_best, b_id, b_total = rank_block(
                                b_best, b_id, b_total, b_s, so_far, first, limit, block, scale_log2,
                                TEST_FIRST, False,
                            )  # fmt: skip
                            so_far = tl.full([ROWS], float("-inf"), tl.float32)
                else:
                    b_s = tl.reshape(b_s, [ROWS, TILE_BLOCKS, B])
                    # [ROWS, TILE_BLOCKS]
                    b_highest = tl.max(b_s, axis=2)
                    b_sum = b_highest
                    if WITH_LSE:
                        b_sum = tl.sum(tl.exp2((b_s - b_highest[:, :, None]) * scale_log2), axis=2)
                    o_column = tl.arange(0, TILE_BLOCKS)[None, :]
                    for j in tl.static_range(TILE_BLOCKS):
                        score = tl.max(tl.where(o_column == j, b_highest, float("-inf")), axis=1)
                        seen = (block + j >= first) & (block + j <= limit) & (block + j < stop)
                        score = tl.where(seen, score, float("-inf"))
                        total = score
                        if WITH_LSE:
                            total = tl.sum(tl.where(o_column == j, b_sum, 0.0), axis=1)
                        b_best, b_id, b_total = insert_block(
                            b_best, b_id, b_total, score[None, :], block + j, total, WITH_LSE
                        )
            # stop is below start where no row has a block left before `end`: the loop ends then
            cursor = tl.maximum(stop, start)
    if WITH_LSE:
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        # forced blocks of the rows: few where positions are consecutive, and one split's work
        if split == 0:
            last = token.to(tl.int32)
            begin_forced = tl.maximum(first, own - LOCAL_BLOCKS + 1)
            cursor = tl.min(tl.where(own >= 0, begin_forced, NO_BLOCK), axis=0)
            while cursor < NO_BLOCK:
                b_s = key_scores(
                    q_desc, k_desc, b_q, tile * ROWS, cursor * B, CHUNK, NUM_CHUNKS, ROWS, KEYS, STAGES
                )
                o_key = cursor * B + tl.arange(0, KEYS)
                inside = o_key < (cursor + TILE_BLOCKS) * B
                m_s = (o_key[None, :] >= (begin_forced * B)[:, None]) & inside[None, :]
                m_s &= (o_key[None, :] <= last[:, None]) & (own >= 0)[:, None]
                b_s = tl.where(m_s, b_s * scale_log2, float("-inf"))
                peak, total = add_exp(peak, total, b_s)
                ahead = tl.maximum(begin_forced, cursor + TILE_BLOCKS)
                cursor = tl.min(tl.where(own >= cursor + TILE_BLOCKS, ahead, NO_BLOCK), axis=0)
    if SPLIT:
        o_part = row.to(tl.int64)[None, :] * (num_splits * KP) + split * KP + o_slot
        m_part = (row < num_rows)[None, :] & (o_slot >= 0)
        tl.store(score_part + o_part, tl.where(o_slot < K, b_best, float("-inf")), m_part)
        tl.store(id_part + o_part, b_id, m_part)
        if WITH_LSE:
            tl.store(total_part + o_part, b_total, m_part)
            if split == 0:
                tl.store(forced_lse + row, peak + tl.log2(total), row < num_rows)
    else:
        if WITH_LSE:
            # a forced block's slot has +inf, an empty one -inf
            m_scored = (tl.abs(b_best) != float("inf")) & (o_slot < K)
            b_lse = tl.where(m_scored, b_best * scale_log2 + tl.log2(b_total), float("-inf"))
            peak, total = add_exp(peak, total, tl.trans(b_lse))
            tl.store(lse + row, (peak + tl.log2(total)) * LN2, row < num_rows)
        # slots that nothing was put into, and those beyond K
        b_id = tl.where((b_best == float("-inf")) | (o_slot >= K), NO_BLOCK, b_id)
        store_ascending(out, b_id, row, num_rows, K, KP)

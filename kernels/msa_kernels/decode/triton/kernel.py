"""Triton kernels of decoding: block scores, best blocks, attention over parts of them, merge of the parts.

A tile is one block, or a part of one. Tokens of one block lie in one page, so a tile needs one page number.
USE_DOT: products on tensor cores. Without it (fp32, whose digits they would drop): sums over elements.
"""

import triton
import triton.language as tl

from msa_kernels.select_blocks.triton.rows_kernel import NO_BLOCK


@triton.jit
def _place(table_ptr, sequence, token, page_size, pages_per_sequence, HAS_TABLE: tl.constexpr):
    """Page of a token, and its place in the page; a flat cache is one page per sequence."""
    if HAS_TABLE:
        page = tl.load(table_ptr + sequence.to(tl.int64) * pages_per_sequence + token // page_size)
        return page.to(tl.int64), token % page_size
    else:
        return sequence.to(tl.int64), token


@triton.jit
def _from_fp8(bits, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """float8_e4m3fn in uint8 -> dtype; NATIVE False: 2^-8 of the values, from their bits.

    The 4 bits of the exponent, its bias 7, become the last 4 of fp16's 5, whose bias is 15; subnormal numbers
    too. Example: 0x40 is 2 (exponent 8), as fp16 0x2000 it is 2^-7 (exponent 8). No NaN: 0x7f becomes 480.
    """
    if NATIVE:
        return bits.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        wide = bits.to(tl.int16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.int16)
        return half.to(tl.float16, bitcast=True).to(dtype)


@triton.jit
def decode_scores_kernel(
    q_ptr,
    k_ptr,
    scale_ptr,
    table_ptr,
    seq_lens_ptr,
    score_ptr,
    num_blocks,
    page_size,
    pages_per_sequence,
    k_page_stride,
    k_token_stride,
    scale_page_stride,
    scale_token_stride,
    blocks_per_program,
    NUM_GROUPS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    USE_DOT: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid [cdiv(num_blocks, blocks_per_program), B]. score [B, M, num_blocks] fp32, all of it written.

    q [B, M, DIM], index keys [pages, page_size, DIM]. Forced blocks, and those not there, get -inf.
    FP8: index keys are float8_e4m3fn in uint8, with a scale per token [pages, page_size] fp32.
    """
    sequence = tl.program_id(1)
    # forced blocks need no score, and all others are whole
    num_scored = tl.cdiv(tl.load(seq_lens_ptr + sequence), BLOCK_SIZE).to(tl.int32) - LOCAL_BLOCKS
    group = tl.arange(0, GROUP_ROWS)
    dim = tl.arange(0, DIM_PAD)
    row = tl.arange(0, TILE_N)
    q_offset = (sequence * NUM_GROUPS + group)[:, None] * DIM + dim[None, :]
    q = tl.load(q_ptr + q_offset, (group < NUM_GROUPS)[:, None] & (dim < DIM)[None, :], 0.0)
    is_key = (row < BLOCK_SIZE)[:, None] & (dim < DIM)[None, :]
    target = score_ptr + (sequence.to(tl.int64) * NUM_GROUPS + group) * num_blocks
    begin = tl.program_id(0) * blocks_per_program
    end = tl.minimum(begin + blocks_per_program, num_blocks)
    scored_end = tl.maximum(tl.minimum(end, num_scored), begin)
    for block in tl.range(begin, scored_end, num_stages=NUM_STAGES):
        page, token = _place(
            table_ptr, sequence, block * BLOCK_SIZE, page_size, pages_per_sequence, HAS_TABLE
        )
        source = k_ptr + page * k_page_stride + (token + row).to(tl.int64)[:, None] * k_token_stride
        scale = tl.full([TILE_N], 1.0, tl.float32)
        if FP8:
            k = _from_fp8(tl.load(source + dim[None, :], is_key, 0), q.dtype, NATIVE_FP8)
            scale_row = page * scale_page_stride + (token + row).to(tl.int64) * scale_token_stride
            scale = tl.load(scale_ptr + scale_row, row < BLOCK_SIZE, 0.0)
            if not NATIVE_FP8:
                scale *= 256.0
        else:
            k = tl.load(source + dim[None, :], is_key, 0.0)
        if USE_DOT:
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            if FP8:
                scores *= scale[:, None]
            if TILE_N > BLOCK_SIZE:
                scores = tl.where((row < BLOCK_SIZE)[:, None], scores, float("-inf"))
            tl.store(target + block, tl.max(scores, axis=0), group < NUM_GROUPS)
        else:
            for g in range(NUM_GROUPS):
                own = (sequence * NUM_GROUPS + g) * DIM + dim
                products = k * tl.load(q_ptr + own, dim < DIM, 0.0)[None, :]
                score = tl.where(row < BLOCK_SIZE, tl.sum(products, axis=1) * scale, float("-inf"))
                group_target = score_ptr + (sequence.to(tl.int64) * NUM_GROUPS + g) * num_blocks
                tl.store(group_target + block, tl.max(score, axis=0))
    for block in range(scored_end, end):
        tl.store(target + block, tl.full([GROUP_ROWS], float("-inf"), tl.float32), group < NUM_GROUPS)


@triton.jit
def best_candidates_kernel(
    score_ptr,
    id_ptr,
    best_score_ptr,
    best_id_ptr,
    num_candidates,
    num_chunks,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ID_IS_COLUMN: tl.constexpr,
):
    """Grid [num_chunks, rows]: the TOPK best of each CHUNK candidates, equal ones by the lower id.

    score, id [rows, num_candidates] -> best_score, best_id [rows, num_chunks * SLOTS].
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < num_candidates
    scores = tl.load(score_ptr + row * num_candidates + column, inside, float("-inf"))
    ids = column
    if not ID_IS_COLUMN:
        ids = tl.load(id_ptr + row * num_candidates + column, inside, NO_BLOCK)
    slot = tl.arange(0, SLOTS)
    best_score = tl.full([SLOTS], float("-inf"), tl.float32)
    best_id = tl.full([SLOTS], NO_BLOCK, tl.int32)
    for i in range(TOPK):
        top = tl.max(scores, axis=0)
        block = tl.min(tl.where(scores == top, ids, NO_BLOCK), axis=0)
        best_score = tl.where(slot == i, top, best_score)
        best_id = tl.where(slot == i, block, best_id)
        scores = tl.where(ids == block, float("-inf"), scores)
    target = (row * num_chunks + chunk) * SLOTS + slot
    tl.store(best_score_ptr + target, best_score)
    tl.store(best_id_ptr + target, best_id)


@triton.jit
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_ptr,
    table_ptr,
    seq_lens_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    page_size,
    pages_per_sequence,
    k_page_stride,
    k_token_stride,
    k_group_stride,
    v_page_stride,
    v_token_stride,
    v_group_stride,
    num_parts,
    part_slots,
    NUM_GROUPS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    USE_DOT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid [num_parts, B * H / HEADS]: HEADS heads of a KV group over part_slots of its selected blocks.

    q [B, H, DIM], blocks [B, M, TOPK] -> out [B, M, num_parts, GROUP_HEADS, DIM], lse [B, M, num_parts,
    GROUP_HEADS], natural log. A part without a token gets 0 and -inf.
    """
    part = tl.program_id(0)
    first_head = tl.program_id(1) * HEADS
    pair = first_head // GROUP_HEADS
    sequence, kv_group = pair // NUM_GROUPS, (pair % NUM_GROUPS).to(tl.int64)
    length = tl.load(seq_lens_ptr + sequence).to(tl.int32)
    head = tl.arange(0, HEAD_ROWS)
    dim = tl.arange(0, DIM_PAD)
    row = tl.arange(0, TILE_N)
    is_head = (head < HEADS)[:, None] & (dim < DIM)[None, :]
    q = tl.load(q_ptr + (first_head + head)[:, None] * DIM + dim[None, :], is_head, 0.0)
    acc = tl.zeros([HEAD_ROWS, DIM_PAD], tl.float32)
    peak = tl.full([HEAD_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_ROWS], tl.float32)
    for i in tl.range(0, part_slots * TILES_PER_BLOCK, num_stages=NUM_STAGES):
        slot = part * part_slots + i // TILES_PER_BLOCK
        block = tl.load(block_ptr + pair.to(tl.int64) * TOPK + slot, slot < TOPK, -1)
        first = (i % TILES_PER_BLOCK) * TILE_N
        start = tl.maximum(block, 0) * BLOCK_SIZE
        page, token = _place(table_ptr, sequence, start, page_size, pages_per_sequence, HAS_TABLE)
        # an empty slot ends before its first token
        stop = tl.where(block >= 0, length, 0)
        seen = (first + row < BLOCK_SIZE) & (start + first + row < stop)
        token = (token + first + row).to(tl.int64)[:, None]
        is_token = seen[:, None] & (dim < DIM)[None, :]
        k_source = k_ptr + page * k_page_stride + kv_group * k_group_stride + token * k_token_stride
        v_source = v_ptr + page * v_page_stride + kv_group * v_group_stride + token * v_token_stride
        k = tl.load(k_source + dim[None, :], is_token, 0.0)
        v = tl.load(v_source + dim[None, :], is_token, 0.0)
        if USE_DOT:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            scores = tl.sum(k * q, axis=1)[None, :]
        scores = tl.where(seen[None, :], scores * scale_log2, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        # nothing seen so far: -inf - -inf would not be 0
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - base)
        weight = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        if USE_DOT:
            acc += tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        else:
            acc += tl.sum(v * tl.trans(weight), axis=0)[None, :]
        peak = new_peak
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    lse = (tl.where(total > 0, peak, 0.0) + tl.log2(total)) * 0.6931471805599453
    target = (pair.to(tl.int64) * num_parts + part) * GROUP_HEADS + first_head % GROUP_HEADS + head
    tl.store(out_ptr + target[:, None] * DIM + dim[None, :], result.to(out_ptr.dtype.element_ty), is_head)
    tl.store(lse_ptr + target, lse, head < HEADS)


@triton.jit
def merge_parts_kernel(
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    num_parts,
    GROUP_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PARTS_PAD: tl.constexpr,
):
    """Grid [B * H]: parts [B, M, num_parts, GROUP_HEADS, DIM] weighted by their share of the softmax."""
    query_head = tl.program_id(0).to(tl.int64)
    pair, head = query_head // GROUP_HEADS, query_head % GROUP_HEADS
    part = tl.arange(0, PARTS_PAD)
    dim = tl.arange(0, DIM_PAD)
    source = (pair * num_parts + part) * GROUP_HEADS + head
    part_lse = tl.load(part_lse_ptr + source, part < num_parts, float("-inf"))
    peak = tl.max(part_lse, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(part_lse - peak)
    total = tl.sum(weight, axis=0)
    inside = (part < num_parts)[:, None] & (dim < DIM)[None, :]
    part_out = tl.load(part_out_ptr + source[:, None] * DIM + dim[None, :], inside, 0.0)
    out = tl.sum(part_out * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + query_head * DIM + dim, out.to(out_ptr.dtype.element_ty), dim < DIM)
    tl.store(lse_ptr + query_head, peak + tl.log(total))

"""Decode by Triton kernels: block scores, best blocks, attention over parts of them, merge of the parts.

Shapes: M KV heads, G query heads of each, H = M * G, K top-k slots, D head dim (of index keys in the
scores), B block size, NB blocks, P pages. MP, DP, KP, BP, HP are powers of two that hold M, D, K, B and a
program's heads. The number of sequences is a size of the grid. Prefixes: o_ offsets, m_ masks, p_ pointers,
b_ tiles.

A tile is one block, or a part of one. Tokens of one block lie in one page, so a tile needs one page number.
USE_DOT: products on tensor cores. Without it (fp32, whose digits they would drop): sums over elements.
"""

import triton
import triton.language as tl

from msa_kernels.select_blocks.triton.rows_kernel import NO_BLOCK

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_page(page_table, sequence, token, page_size, pages_per_sequence, HAS_TABLE: tl.constexpr):
    """Look up the page of a token, and its place in the page; a flat cache is one page per sequence.

    Example (pages of 256 tokens, sequence 1 with pages 7, 3): token 300 lies in page 3, at place 44.
    """
    if HAS_TABLE:
        page = tl.load(page_table + sequence.to(tl.int64) * pages_per_sequence + token // page_size)
        return page.to(tl.int64), token % page_size
    else:
        return sequence.to(tl.int64), token


@triton.jit
def from_fp8(b_bits, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Convert float8_e4m3fn in uint8 to dtype; NATIVE False: to 2^-8 of the values, from their bits.

    The 4 bits of the exponent, its bias 7, become the last 4 of fp16's 5, whose bias is 15; subnormal numbers
    too. Example: 0x40 is 2 (exponent 8), as fp16 0x2000 it is 2^-7 (exponent 8). No NaN: 0x7f becomes 480.
    """
    if NATIVE:
        return b_bits.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        b_wide = b_bits.to(tl.int16)
        b_half = (((b_wide & 0x80) << 8) | ((b_wide & 0x7F) << 7)).to(tl.int16)
        return b_half.to(tl.float16, bitcast=True).to(dtype)


@triton.jit
def decode_scores_kernel(
    q_index,  # [sequences, M, D]
    k_index,  # [P, page_size, D], any strides but the last; uint8 with FP8
    k_scale,  # [P, page_size] fp32, read with FP8
    page_table,  # [sequences, pages_per_sequence] int32 or int64, read with HAS_TABLE
    seq_lens,  # [sequences] int32 or int64
    score,  # [sequences, M, NB] fp32
    num_blocks,
    page_size,
    pages_per_sequence,
    k_page_stride,
    k_token_stride,
    scale_page_stride,
    scale_token_stride,
    blocks_per_program,
    M: tl.constexpr,
    MP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    B: tl.constexpr,
    BP: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    USE_DOT: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Score a few blocks of one sequence; grid [cdiv(NB, blocks_per_program), sequences].

    All of `score` is written: forced blocks, and those not there, get -inf. FP8: index keys are
    float8_e4m3fn, with a scale per token.
    """
    sequence = tl.program_id(1)
    # forced blocks need no score, and all others are whole
    num_scored = tl.cdiv(tl.load(seq_lens + sequence), B).to(tl.int32) - LOCAL_BLOCKS
    o_m = tl.arange(0, MP)
    o_d = tl.arange(0, DP)
    o_b = tl.arange(0, BP)
    o_q = (sequence * M + o_m)[:, None] * D + o_d[None, :]
    b_q = tl.load(q_index + o_q, (o_m < M)[:, None] & (o_d < D)[None, :], 0.0)
    m_k = (o_b < B)[:, None] & (o_d < D)[None, :]
    p_score = score + (sequence.to(tl.int64) * M + o_m) * num_blocks
    begin = tl.program_id(0) * blocks_per_program
    end = tl.minimum(begin + blocks_per_program, num_blocks)
    scored_end = tl.maximum(tl.minimum(end, num_scored), begin)
    for block in tl.range(begin, scored_end, num_stages=STAGES):
        page, place = find_page(page_table, sequence, block * B, page_size, pages_per_sequence, HAS_TABLE)
        p_k = k_index + page * k_page_stride + (place + o_b).to(tl.int64)[:, None] * k_token_stride
        b_scale = tl.full([BP], 1.0, tl.float32)
        if FP8:
            b_k = from_fp8(tl.load(p_k + o_d[None, :], m_k, 0), b_q.dtype, NATIVE_FP8)
            o_scale = page * scale_page_stride + (place + o_b).to(tl.int64) * scale_token_stride
            b_scale = tl.load(k_scale + o_scale, o_b < B, 0.0)
            if not NATIVE_FP8:
                b_scale *= 256.0
        else:
            b_k = tl.load(p_k + o_d[None, :], m_k, 0.0)
        if USE_DOT:
            # [BP, MP]: keys are the rows, as a product has at least 64 of them on Hopper and M is small
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
            if FP8:
                b_s *= b_scale[:, None]
            if BP > B:
                b_s = tl.where((o_b < B)[:, None], b_s, float("-inf"))
            tl.store(p_score + block, tl.max(b_s, axis=0), o_m < M)
        else:
            for m in range(M):
                o_own = (sequence * M + m) * D + o_d
                b_product = b_k * tl.load(q_index + o_own, o_d < D, 0.0)[None, :]
                b_own = tl.where(o_b < B, tl.sum(b_product, axis=1) * b_scale, float("-inf"))
                p_own = score + (sequence.to(tl.int64) * M + m) * num_blocks
                tl.store(p_own + block, tl.max(b_own, axis=0))
    for block in range(scored_end, end):
        tl.store(p_score + block, tl.full([MP], float("-inf"), tl.float32), o_m < M)


@triton.jit
def best_candidates_kernel(
    score,  # [rows, C] fp32
    id,  # [rows, C] int32; not read with ID_IS_COLUMN
    best_score,  # [rows, num_chunks, KP] fp32
    best_id,  # [rows, num_chunks, KP] int32
    num_candidates,
    num_chunks,
    K: tl.constexpr,
    KP: tl.constexpr,
    CHUNK: tl.constexpr,
    ID_IS_COLUMN: tl.constexpr,
):
    """Take the K best of each CHUNK of C candidates, equal ones by the lower id; grid [num_chunks, rows]."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_c = chunk * CHUNK + tl.arange(0, CHUNK)
    m_c = o_c < num_candidates
    b_s = tl.load(score + row * num_candidates + o_c, m_c, float("-inf"))
    b_id = o_c
    if not ID_IS_COLUMN:
        b_id = tl.load(id + row * num_candidates + o_c, m_c, NO_BLOCK)
    o_slot = tl.arange(0, KP)
    b_best = tl.full([KP], float("-inf"), tl.float32)
    b_best_id = tl.full([KP], NO_BLOCK, tl.int32)
    for i in range(K):
        top = tl.max(b_s, axis=0)
        block = tl.min(tl.where(b_s == top, b_id, NO_BLOCK), axis=0)
        b_best = tl.where(o_slot == i, top, b_best)
        b_best_id = tl.where(o_slot == i, block, b_best_id)
        b_s = tl.where(b_id == block, float("-inf"), b_s)
    o_best = (row * num_chunks + chunk) * KP + o_slot
    tl.store(best_score + o_best, b_best)
    tl.store(best_id + o_best, b_best_id)


@triton.jit
def decode_attention_kernel(
    q,  # [sequences, H, D]
    k,  # [P, page_size, M, D], any strides but the last
    v,  # [P, page_size, M, D], any strides but the last
    block_indices,  # [sequences, M, K] int32, -1 where empty
    page_table,  # [sequences, pages_per_sequence] int32 or int64, read with HAS_TABLE
    seq_lens,  # [sequences] int32 or int64
    out_part,  # [sequences, M, num_parts, G, D]
    lse_part,  # [sequences, M, num_parts, G] fp32, natural log
    scale_log2,
    page_size,
    pages_per_sequence,
    k_page_stride,
    k_token_stride,
    k_head_stride,
    v_page_stride,
    v_token_stride,
    v_head_stride,
    num_parts,
    part_slots,
    M: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    B: tl.constexpr,
    KEYS: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    K: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    USE_DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend with HEADS query heads of a KV head to part_slots of its blocks.

    Grid [num_parts, sequences * H / HEADS]; KEYS tokens per step. A part without a token gets 0 and -inf.

    Example (K 16, num_parts 3, part_slots 6): the programs take slots 0 to 5, 6 to 11, and 12 to 15.
    """
    part = tl.program_id(0)
    first_head = tl.program_id(1) * HEADS
    # (sequence, KV head), M of them to a sequence
    kv_row = first_head // G
    sequence, kv_head = kv_row // M, (kv_row % M).to(tl.int64)
    length = tl.load(seq_lens + sequence).to(tl.int32)
    o_head = tl.arange(0, HP)
    o_d = tl.arange(0, DP)
    o_key = tl.arange(0, KEYS)
    m_q = (o_head < HEADS)[:, None] & (o_d < D)[None, :]
    b_q = tl.load(q + (first_head + o_head)[:, None] * D + o_d[None, :], m_q, 0.0)
    b_o = tl.zeros([HP, DP], tl.float32)
    peak = tl.full([HP], float("-inf"), tl.float32)
    total = tl.zeros([HP], tl.float32)
    for i in tl.range(0, part_slots * TILES_PER_BLOCK, num_stages=STAGES):
        slot = part * part_slots + i // TILES_PER_BLOCK
        block = tl.load(block_indices + kv_row.to(tl.int64) * K + slot, slot < K, -1)
        first = (i % TILES_PER_BLOCK) * KEYS
        start = tl.maximum(block, 0) * B
        page, place = find_page(page_table, sequence, start, page_size, pages_per_sequence, HAS_TABLE)
        # an empty slot ends before its first token
        stop = tl.where(block >= 0, length, 0)
        m_key = (first + o_key < B) & (start + first + o_key < stop)
        o_place = (place + first + o_key).to(tl.int64)[:, None]
        m_kv = m_key[:, None] & (o_d < D)[None, :]
        p_k = k + page * k_page_stride + kv_head * k_head_stride + o_place * k_token_stride
        p_v = v + page * v_page_stride + kv_head * v_head_stride + o_place * v_token_stride
        b_k = tl.load(p_k + o_d[None, :], m_kv, 0.0)
        b_v = tl.load(p_v + o_d[None, :], m_kv, 0.0)
        # [HP, KEYS]
        if USE_DOT:
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        else:
            b_s = tl.sum(b_k * b_q, axis=1)[None, :]
        b_s = tl.where(m_key[None, :], b_s * scale_log2, float("-inf"))
        # The sum so far is total * 2^peak, the output so far b_o * 2^peak: a higher peak shrinks both.
        new_peak = tl.maximum(peak, tl.max(b_s, axis=1))
        # nothing seen so far: -inf - -inf would not be 0
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - base)
        b_p = tl.exp2(b_s - base[:, None])
        total = total * shrink + tl.sum(b_p, axis=1)
        b_o = b_o * shrink[:, None]
        if USE_DOT:
            b_o += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        else:
            b_o += tl.sum(b_v * tl.trans(b_p), axis=0)[None, :]
        peak = new_peak
    # normalised by the part's own sum, so that the merge has nothing to know but its log
    b_o = b_o / tl.where(total > 0, total, 1.0)[:, None]
    b_lse = (tl.where(total > 0, peak, 0.0) + tl.log2(total)) * LN2
    o_out = (kv_row.to(tl.int64) * num_parts + part) * G + first_head % G + o_head
    tl.store(out_part + o_out[:, None] * D + o_d[None, :], b_o.to(out_part.dtype.element_ty), m_q)
    tl.store(lse_part + o_out, b_lse, o_head < HEADS)


@triton.jit
def merge_parts_kernel(
    out_part,  # [sequences, M, num_parts, G, D] fp32
    lse_part,  # [sequences, M, num_parts, G] fp32
    out,  # [sequences, H, D]
    lse,  # [sequences, H] fp32
    num_parts,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    NP: tl.constexpr,
):
    """Weight the parts of one query head by their share of the softmax; grid [sequences * H].

    lse = log of the sum of exp(lse_part), out = sum of exp(lse_part - lse) * out_part. NP holds num_parts.
    """
    query_head = tl.program_id(0).to(tl.int64)
    kv_row, head = query_head // G, query_head % G
    o_part = tl.arange(0, NP)
    o_d = tl.arange(0, DP)
    o_in = (kv_row * num_parts + o_part) * G + head
    b_lse = tl.load(lse_part + o_in, o_part < num_parts, float("-inf"))
    peak = tl.max(b_lse, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(b_lse - peak)
    total = tl.sum(weight, axis=0)
    m_part = (o_part < num_parts)[:, None] & (o_d < D)[None, :]
    b_part = tl.load(out_part + o_in[:, None] * D + o_d[None, :], m_part, 0.0)
    b_o = tl.sum(b_part * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + query_head * D + o_d, b_o.to(out.dtype.element_ty), o_d < D)
    tl.store(lse + query_head, peak + tl.log(total))

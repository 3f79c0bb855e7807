"""Attend by a Triton kernel, queries first: a few neighbouring queries pass over the union of their blocks.

The block-first kernels of forward_kernel.py write a partial output per (row, slot) pair and read it again,
which binds them to memory. Here the softmax runs on in registers and nothing is written but the result; but
every query of the tile is multiplied with every block of the union. So it is worth it where neighbours select
alike, as trained models' do.

Shapes and names as in forward_kernel.py. A tile is a few consecutive queries of one KV head, with L places,
K for each of them, for the blocks of its union.
"""

import triton
import triton.language as tl

from msa_kernels.block_sparse_attention.triton.forward_kernel import LN2


# one kernel for any number of KV heads, 1 too
@triton.jit(do_not_specialize=["num_kv_heads"])
def attend_union_kernel(
    q,  # [R, G, D]
    kv_desc,  # [N * 2 * B, D], tiles [KEYS, DP]: rows of a block's keys, then of its values
    position,  # [T] int64
    window_start,  # [T] int64
    sink_stop,  # [T] int64
    by_union,  # [1] int32, 0: the block-first kernels take this call
    union_block,  # [M, tiles, L] int32, physical blocks, ascending
    union_token,  # [M, tiles, L] int64, position of each block's first token
    union_readers,  # [M, tiles, L] int32, bit i: query i of the tile reads it
    union_size,  # [M, tiles] int32
    out,  # [R, G, D] fp32
    lse,  # [R, G] fp32
    lse_teacher,  # [R, G] fp32
    num_queries,
    num_kv_heads,
    scale_log2,
    inverse_temperature,
    L: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTENED: tl.constexpr,
    MERGE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend with one tile of queries; grid [M * tiles], tiles of one KV head side by side.

    KEYS divides B: a step takes that many keys of a block. MERGE: out and the log-sum-exps hold results over
    other blocks, which are merged with these; rows without a block here are neither read nor written.
    """
    if tl.load(by_union) == 0:
        return
    num_tiles = tl.cdiv(num_queries, ROWS // GP)
    tile = tl.program_id(0)
    kv_head = tile // num_tiles
    o_row = tl.arange(0, ROWS)
    member = o_row // GP
    head = o_row % GP
    query = tile % num_tiles * (ROWS // GP) + member
    m_query = query < num_queries
    m_row = m_query & (head < G)
    o_rg = (query.to(tl.int64) * num_kv_heads + kv_head) * G + head
    o_d = tl.arange(0, DP)
    m_q = m_row[:, None] & (o_d < D)[None, :]
    b_q = tl.load(q + o_rg[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
    b_position = tl.load(position + query, mask=m_query, other=-1)
    b_start = b_position
    b_sink = b_position
    if WINDOWED:
        b_start = tl.load(window_start + query, mask=m_query, other=0)
        b_sink = tl.load(sink_stop + query, mask=m_query, other=0)
    size = tl.load(union_size + tile)
    o_list = tile.to(tl.int64) * L
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    softened = tl.zeros([ROWS], tl.float32)
    b_o = tl.zeros([ROWS, DP], tl.float32)
    # whether any block of the union is the row's: rows without one are not touched
    reads = tl.zeros([ROWS], tl.int32)
    for step in tl.range(0, size * (B // KEYS), num_stages=STAGES):
        place = o_list + step // (B // KEYS)
        first_key = step % (B // KEYS) * KEYS
        physical_block = tl.load(union_block + place)
        readers = tl.load(union_readers + place)
        first_token = tl.load(union_token + place)
        b_k = kv_desc.load([physical_block * (2 * B) + first_key, 0])
        b_v = kv_desc.load([physical_block * (2 * B) + B + first_key, 0])
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        # one comparison for both: a row that does not read the block sees up to token -1 of it
        mine = (readers >> member) & 1
        reads = reads | mine
        last = tl.where(mine > 0, (b_position - first_token).to(tl.int32), -1)
        o_b = first_key + tl.arange(0, KEYS)
        m_s = o_b[None, :] <= last[:, None]
        if WINDOWED:
            start = (b_start - first_token).to(tl.int32)
            sink = (b_sink - first_token).to(tl.int32)
            m_s = m_s & ((o_b[None, :] >= start[:, None]) | (o_b[None, :] < sink[:, None]))
        b_s = tl.where(m_s, b_s, float("-inf"))
        # scale_log2 > 0: the largest product has the largest score
        new_peak = tl.maximum(peak, tl.max(b_s, 1) * scale_log2)
        # nothing seen yet: probabilities are 0, not e^(-inf + inf)
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        b_s = b_s * scale_log2 - safe[:, None]
        b_p = tl.exp2(b_s)
        shrink = tl.exp2(peak - safe)
        total = total * shrink + tl.sum(b_p, 1)
        if SOFTENED:
            softer = tl.sum(tl.exp2(b_s * inverse_temperature), 1)
            softened = softened * tl.exp2((peak - safe) * inverse_temperature) + softer
        b_o = b_o * shrink[:, None]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
        peak = new_peak
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    b_lse = (peak + tl.log2(total)) * LN2
    b_o *= (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    if MERGE:
        m_row = m_row & (reads > 0)
        m_q = m_row[:, None] & (o_d < D)[None, :]
    p_out = out + o_rg[:, None] * D + o_d[None, :]
    if SOFTENED:
        b_teacher = (peak * inverse_temperature + tl.log2(softened)) * LN2
        if MERGE:
            before = tl.load(lse_teacher + o_rg, mask=m_row, other=float("-inf"))
            b_teacher, _, _ = merged_with(before, b_teacher)
        tl.store(lse_teacher + o_rg, b_teacher, mask=m_row)
    if MERGE:
        before = tl.load(lse + o_rg, mask=m_row, other=float("-inf"))
        b_lse, share_before, share = merged_with(before, b_lse)
        b_o = b_o * share[:, None] + tl.load(p_out, mask=m_q, other=0.0) * share_before[:, None]
    tl.store(lse + o_rg, b_lse, mask=m_row)
    tl.store(p_out, b_o, mask=m_q)


@triton.jit
def merged_with(before, now):
    """Merge two natural log-sum-exps: log(e^before + e^now), and the share of either, 0 where neither is."""
    peak = tl.maximum(before, now)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = peak + tl.log(tl.exp(before - peak) + tl.exp(now - peak))
    finite = tl.where(total == float("-inf"), 0.0, total)
    return total, tl.exp(before - finite), tl.exp(now - finite)

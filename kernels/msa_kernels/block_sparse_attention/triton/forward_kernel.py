"""Attend by Triton kernels: the queries that read a block, block by block, and the sum over blocks.

Shapes: T queries, M KV heads, R = T * M rows (query, KV head), K slots, G query heads of a KV head, D head
dim, N physical blocks, NB blocks of the pack, B block size, I items, P = R * K pairs. A pair is a (row,
slot) pair, numbered row * K + slot. GP, DP, BP are powers of two that hold G, D, B; a tile holds ROWS =
queries * GP rows. Scores are kept as powers of two: scale_log2 = scale * log2(e). Tensors of pairs and rows
belong to one portion of the queries and hold less than 2^31 values; offsets into tensors of blocks have 64
bits. Prefixes: o_ offsets, m_ masks, p_ pointers, b_ tiles.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def visible_tokens(position, window_start, sink_stop, query, first_token, o_token, WINDOWED: tl.constexpr):
    """Mark tokens that queries see: query ids [X] of any shape that broadcasts against o_token -> bool."""
    last = (tl.load(position + query) - first_token).to(tl.int32)
    seen = o_token <= last
    if WINDOWED:
        start = (tl.load(window_start + query) - first_token).to(tl.int32)
        sink = (tl.load(sink_stop + query) - first_token).to(tl.int32)
        seen = seen & ((o_token >= start) | (o_token < sink))
    return seen


@triton.jit
def attend_kernel(
    q,  # [R, G, D]
    kv,  # [N, 2, B, D]
    block,  # [N] int64
    position,  # [T] int64
    window_start,  # [T] int64
    sink_stop,  # [T] int64
    order,  # [P] int32, pairs by physical block
    item_physical_block,  # [I] int32
    item_begin,  # [I] int64
    item_stop,  # [I] int64
    num_items,  # [1] int64
    out_part,  # [P, G, D], dtype of q
    lse_part,  # [P, G] fp32
    teacher_part,  # [P, G] fp32
    scale_log2,
    inverse_temperature,
    M: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTENED: tl.constexpr,
):
    """Serve one item: a block stays in shared memory while the queries that read it pass by, ROWS at a time.

    Every (row, slot) pair belongs to one item, which writes the pair's output and log-sum-exp over this block
    alone. A block is one tile wide, so no softmax has to be corrected on the way.
    """
    # the grid is what any selection may need; programs beyond the true number end at once
    item = tl.program_id(0)
    if item >= tl.load(num_items):
        return
    physical_block = tl.load(item_physical_block + item).to(tl.int64)
    begin = tl.load(item_begin + item).to(tl.int32)
    stop = tl.load(item_stop + item).to(tl.int32)
    first_token = tl.load(block + physical_block) * B
    o_b = tl.arange(0, BP)
    o_d = tl.arange(0, DP)
    o_row = tl.arange(0, ROWS)
    # rows of a tile run over the heads first: with GP 4, row 6 is head 2 of the second query
    head = o_row % GP
    # On their way before anything else: the rows of the first step, and the pairs of the second. A load whose
    # address was loaded too is not fetched ahead by the compiler, whatever `num_stages` is.
    place = begin + o_row // GP
    pair = tl.load(order + place, mask=place < stop, other=0)
    m_row = (place < stop) & (head < G)
    p_q = q + (pair // K * G + head)[:, None] * D + o_d[None, :]
    b_q = tl.load(p_q, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    place += ROWS // GP
    next_pair = tl.load(order + place, mask=place < stop, other=0)
    p_k = kv + physical_block * (2 * B * D) + o_b[:, None] * D + o_d[None, :]
    m_kv = (o_b < B)[:, None] & (o_d < D)[None, :]
    b_k = tl.load(p_k, mask=m_kv, other=0.0)
    b_v = tl.load(p_k + B * D, mask=m_kv, other=0.0)
    # Transposed in the loop, K would be kept in registers and copied to shared memory in every step.
    b_kt = tl.trans(b_k)
    for first in tl.range(begin, stop, ROWS // GP, num_stages=1):
        # the rows of the next step and the pairs of the one after it
        place = first + ROWS // GP + o_row // GP
        m_next = ((place < stop) & (head < G))[:, None] & (o_d < D)[None, :]
        p_q = q + (next_pair // K * G + head)[:, None] * D + o_d[None, :]
        b_next = tl.load(p_q, mask=m_next, other=0.0)
        place += ROWS // GP
        later_pair = tl.load(order + place, mask=place < stop, other=0)
        place = first + o_row // GP
        m_row = (place < stop) & (head < G)
        # [ROWS, BP]
        b_s = tl.dot(b_q, b_kt, input_precision="ieee")
        if MASKED:
            query = pair // K // M
            m_s = visible_tokens(
                position, window_start, sink_stop, query[:, None], first_token, o_b[None, :], WINDOWED
            )
            b_s = tl.where(m_s, b_s, float("-inf"))
        if BP != B:
            b_s = tl.where((o_b < B)[None, :], b_s, float("-inf"))
        # scale_log2 > 0: the largest product has the largest score
        peak = tl.max(b_s, 1)
        # A query may see nothing of the block (window): probabilities 0 then, and lse -inf.
        peak = tl.where(peak == float("-inf"), 0.0, peak) * scale_log2
        # scaled and subtracted by one instruction
        b_s = b_s * scale_log2 - peak[:, None]
        o_pair = pair * G + head
        if SOFTENED:
            total = tl.sum(tl.exp2(b_s * inverse_temperature), 1)
            teacher = (peak * inverse_temperature + tl.log2(total)) * LN2
            tl.store(teacher_part + o_pair, teacher, mask=m_row)
        b_p = tl.exp2(b_s)
        total = tl.sum(b_p, 1)
        tl.store(lse_part + o_pair, (peak + tl.log2(total)) * LN2, mask=m_row)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        # normalised here, so that the merge has nothing to know but the log-sum-exp
        b_o *= (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
        # read once, much later: not at the cost of rows of q in the cache
        tl.store(
            out_part + o_pair[:, None] * D + o_d[None, :],
            b_o.to(out_part.dtype.element_ty),
            mask=m_row[:, None] & (o_d < D)[None, :],
            cache_modifier=".cs",
        )
        pair, next_pair, b_q = next_pair, later_pair, b_next


@triton.jit
def index_lse_kernel(
    q_index,  # [R, Di]
    k_index,  # [NB, B, Di]
    block,  # [N] int64
    position,  # [T] int64
    window_start,  # [T] int64
    sink_stop,  # [T] int64
    order,  # [P] int32, pairs by physical block
    item_physical_block,  # [I] int32
    item_begin,  # [I] int64
    item_stop,  # [I] int64
    num_items,  # [1] int64
    index_part,  # [P] fp32
    scale_log2,
    M: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    DP: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take the log-sum-exp of the index scores over the block, for each pair of the item."""
    item = tl.program_id(0)
    if item >= tl.load(num_items):
        return
    physical_block = tl.load(item_physical_block + item).to(tl.int64)
    begin = tl.load(item_begin + item).to(tl.int32)
    stop = tl.load(item_stop + item).to(tl.int32)
    block_id = tl.load(block + physical_block)
    o_b = tl.arange(0, BP)
    o_d = tl.arange(0, DP)
    o_row = tl.arange(0, ROWS)
    p_k = k_index + block_id * (B * D) + o_b[:, None] * D + o_d[None, :]
    b_kt = tl.trans(tl.load(p_k, mask=(o_b < B)[:, None] & (o_d < D)[None, :], other=0.0))
    for first in tl.range(begin, stop, ROWS, num_stages=STAGES):
        place = first + o_row
        m_row = place < stop
        pair = tl.load(order + place, mask=m_row, other=0)
        row = pair // K
        p_q = q_index + row[:, None] * D + o_d[None, :]
        b_q = tl.load(p_q, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
        b_s = tl.dot(b_q, b_kt, input_precision="ieee") * scale_log2
        if MASKED:
            query = row // M
            m_s = visible_tokens(
                position, window_start, sink_stop, query[:, None], block_id * B, o_b[None, :], WINDOWED
            )
            b_s = tl.where(m_s, b_s, float("-inf"))
        if BP != B:
            b_s = tl.where((o_b < B)[None, :], b_s, float("-inf"))
        peak = tl.max(b_s, 1)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp2(b_s - peak[:, None]), 1)
        tl.store(index_part + pair, (peak + tl.log2(total)) * LN2, mask=m_row)


@triton.jit
def log_sum(b_part, p_total, m_total, MERGE: tl.constexpr):
    """Take the natural log of the sum of exp(b_part [KP, X]) over slots; MERGE: and of what is at p_total."""
    peak = tl.max(b_part, 0)
    b_before = tl.full(peak.shape, float("-inf"), tl.float32)
    if MERGE:
        b_before = tl.load(p_total, mask=m_total, other=float("-inf"))
        peak = tl.maximum(peak, b_before)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    b_sum = tl.sum(tl.exp(b_part - peak[None, :]), 0)
    if MERGE:
        b_sum += tl.exp(b_before - peak)
    return peak + tl.log(b_sum), b_before


@triton.jit
def combine_kernel(
    used,  # [P] uint8
    out_part,  # [P, G, D]
    lse_part,  # [P, G] fp32
    teacher_part,  # [P, G] fp32
    index_part,  # [P] fp32
    out,  # [R, G, D] fp32
    lse,  # [R, G] fp32
    lse_teacher,  # [R, G] fp32
    lse_index,  # [R] fp32
    by_union,  # [1] int32, with OR_UNION: not 0 where union_kernel.py has formed all but lse_index
    num_rows,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    KP: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTENED: tl.constexpr,
    INDEXED: tl.constexpr,
    OR_UNION: tl.constexpr,
    MERGE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Weight the partial results of ROWS (row, query head) by their share of the sum of exponentials.

    lse = log of the sum over slots of exp(lse_part), out = sum over slots of exp(lse_part - lse) * out_part.

    Parts of unused pairs were never written and are not read. MERGE: out and the log-sum-exps hold results
    over other blocks, which are merged with these; rows without a block here are neither read nor written.
    """
    o_row = tl.arange(0, ROWS)
    head = o_row % GP
    row = tl.program_id(0).to(tl.int64) * (ROWS // GP) + o_row // GP
    o_d = tl.arange(0, DP)
    o_k = tl.arange(0, KP)[:, None]
    m_row = (row < num_rows) & (head < G)
    # [KP, ROWS]
    # all slots of a row side by side: K numbers each, few beside the outputs
    pair = row[None, :] * K + o_k
    m_part = m_row[None, :] & (o_k < K)
    m_part = m_part & (tl.load(used + pair, mask=m_part, other=0) > 0)
    if MERGE:
        m_row = m_row & (tl.max(m_part.to(tl.int32), 0) > 0)
    if INDEXED:
        scores = tl.load(index_part + pair, mask=m_part, other=float("-inf"))
        m_first = m_row & (head == 0)
        scores, _ = log_sum(scores, lse_index + row, m_first, MERGE)
        tl.store(lse_index + row, scores, mask=m_first)
    # the outer one is decided when the kernel is compiled
    if OR_UNION:  # noqa: SIM102
        if tl.load(by_union) != 0:
            return
    part_lse = tl.load(lse_part + pair * G + head[None, :], mask=m_part, other=float("-inf"))
    total, before = log_sum(part_lse, lse + row * G + head, m_row, MERGE)
    tl.store(lse + row * G + head, total, mask=m_row)
    if SOFTENED:
        softened = tl.load(teacher_part + pair * G + head[None, :], mask=m_part, other=float("-inf"))
        softened, _ = log_sum(softened, lse_teacher + row * G + head, m_row, MERGE)
        tl.store(lse_teacher + row * G + head, softened, mask=m_row)
    # a row without a block: -inf - -inf would not be a number, -inf - 0 has weight 0
    finite = tl.where(total == float("-inf"), 0.0, total)
    p_out = out + (row * G + head)[:, None] * D + o_d[None, :]
    m_out = m_row[:, None] & (o_d < D)[None, :]
    # outputs slot by slot: [KP, ROWS, DP] at a time would not fit into registers
    b_o = tl.zeros([ROWS, DP], dtype=tl.float32)
    if MERGE:
        b_o = tl.load(p_out, mask=m_out, other=0.0) * tl.exp(before - finite)[:, None]
    for slot in tl.range(0, K, num_stages=STAGES):
        one = row * K + slot
        there = m_row & (tl.load(used + one, mask=m_row, other=0) > 0)
        weight = tl.exp(tl.load(lse_part + one * G + head, mask=there, other=float("-inf")) - finite)
        p_part = out_part + (one * G + head)[:, None] * D + o_d[None, :]
        m_part_out = there[:, None] & (o_d < D)[None, :]
        b_part = tl.load(p_part, mask=m_part_out, other=0.0, eviction_policy="evict_first")
        b_o += b_part.to(tl.float32) * weight[:, None]
    tl.store(p_out, b_o, mask=m_out)

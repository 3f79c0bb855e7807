"""Form gradients by Triton kernels: of the queries that read a block and of the block itself.

Shapes and names as in forward_kernel.py. Gradients of K and V belong to the program that holds the block;
where a long list is split, its parts are kept apart and added in order. Gradients of queries are kept per
pair and added by slot. So every sum has one order, and nothing is added atomically.

With p = exp(s - lse) and dp = dout . v: ds = p * (dp - delta), where delta = dout . out is the sum of p * dp
over all keys; dk = scale * ds^T q, dq = scale * ds k, dv = p^T dout. ../tiled_backward.py derives it, and
the KL loss's.
"""

import triton
import triton.language as tl

from msa_kernels.block_sparse_attention.triton.forward_kernel import LOG2E, visible_tokens
from msa_kernels.log2 import log2_approx


@triton.jit
def store_gradient(
    p_grad, b_grad, o_b, num_add, B: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ADD: tl.constexpr
):
    """Store b_grad [X, DP] in rows o_b of [B, D], or with ADD add it there in the rows below num_add.

    By halves, so that what is added to takes few registers beside two gradients.
    """
    # [X, DP] -> [X, DP // 2] twice: tl.split takes apart a last dim of 2
    halves = tl.permute(tl.reshape(b_grad, [b_grad.shape[0], 2, DP // 2]), (0, 2, 1))
    b_low, b_high = tl.split(halves)
    o_d = tl.arange(0, DP // 2)
    o_low = o_b[:, None] * D + o_d[None, :]
    m_low = (o_b < B)[:, None] & (o_d < D)[None, :]
    m_high = (o_b < B)[:, None] & (o_d < D - DP // 2)[None, :]
    if ADD:
        m_add = (o_b < num_add)[:, None]
        b_low += tl.load(p_grad + o_low, mask=m_low & m_add, other=0.0)
    tl.store(p_grad + o_low, b_low, mask=m_low)
    if ADD:
        b_high += tl.load(p_grad + o_low + DP // 2, mask=m_high & m_add, other=0.0)
    tl.store(p_grad + o_low + DP // 2, b_high, mask=m_high)


@triton.jit
def output_delta_kernel(
    dout,  # [X, D]
    out,  # [X, D]
    delta,  # [X] fp32
    num_rows,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum dout * out over the channels of ROWS (row, query head)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, DP)
    o_values = row[:, None] * D + o_d[None, :]
    m_row = row < num_rows
    m_values = m_row[:, None] & (o_d < D)[None, :]
    b_dout = tl.load(dout + o_values, mask=m_values, other=0.0).to(tl.float32)
    b_out = tl.load(out + o_values, mask=m_values, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(b_dout * b_out, 1), mask=m_row)


@triton.jit
def attend_backward_kernel(
    q,  # [R, G, D]
    dout,  # [R, G, D], dtype of q
    lse,  # [R, G] fp32
    delta,  # [R, G] fp32
    lse_teacher,  # [R, G] fp32
    kv,  # [N, 2, B, D]
    block,  # [N] int64
    position,  # [T] int64
    window_start,  # [T] int64
    sink_stop,  # [T] int64
    order,  # [P] int32
    item_physical_block,  # [I] int32
    item_begin,  # [I] int64
    item_stop,  # [I] int64
    num_items,  # [1] int64
    item_split,  # [I] int64, place among the parts of split lists, or -1
    dq_part,  # [P, G, D], dtype of q
    teacher_part,  # [P, B] fp32
    dkv,  # [N, 2, B, D] fp32
    dkv_part,  # [splits, 2, B, D] fp32
    scale,
    minus_inverse_scale,
    scale_log2,
    inverse_temperature,
    first_key,  # of the part of the block that this launch works on, BP keys long
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
    WITH_TEACHER: tl.constexpr,
    SOFTENED: tl.constexpr,
    ADD: tl.constexpr,
    ADD_DQ: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Serve one item: K, V and their gradients stay while the queries that read the block pass by.

    Scores are kept as [block, rows], so that they are the left operand of the products with dout and q.
    With WITH_TEACHER, the mean over heads of the probabilities is kept for the KL loss. ADD and ADD_DQ:
    earlier launches have left a sum in dkv and dq_part. WITH_DK, WITH_DV: gradients of K and of the queries,
    and of V; in one launch, or in two where both gradients do not fit into registers.
    """
    item = tl.program_id(0)
    if item >= tl.load(num_items):
        return
    physical_block = tl.load(item_physical_block + item).to(tl.int64)
    begin = tl.load(item_begin + item).to(tl.int32)
    stop = tl.load(item_stop + item).to(tl.int32)
    first_token = tl.load(block + physical_block) * B
    o_b = first_key + tl.arange(0, BP)
    o_d = tl.arange(0, DP)
    o_row = tl.arange(0, ROWS)
    head = o_row % GP
    o_kv = o_b[:, None] * D + o_d[None, :]
    m_kv = (o_b < B)[:, None] & (o_d < D)[None, :]
    b_k = tl.load(kv + physical_block * (2 * B * D) + o_kv, mask=m_kv, other=0.0)
    b_v = tl.load(kv + physical_block * (2 * B * D) + B * D + o_kv, mask=m_kv, other=0.0)
    # the left operand of dq^T = K^T ds^T, transposed once before the loop
    b_kt = tl.trans(b_k)
    split = tl.load(item_split + item)
    # a block whose list is one item writes its gradient, others leave parts for `add_splits_kernel`
    p_dkv = dkv + physical_block * (2 * B * D)
    if split >= 0:
        p_dkv = dkv_part + split * (2 * B * D)
    b_dk = tl.zeros([BP, DP], dtype=tl.float32)
    b_dv = tl.zeros([BP, DP], dtype=tl.float32)
    for first in tl.range(begin, stop, ROWS // GP, num_stages=STAGES):
        place = first + o_row // GP
        m_row = (place < stop) & (head < G)
        # Fetched ahead by hand, as in the forward, pairs would cost two to four registers too many. 32 pairs
        # share a line of the first cache, so that of 8 steps one waits.
        pair = tl.load(order + place, mask=place < stop, other=0)
        row = pair // K
        o_rg = row * G + head
        m_q = m_row[:, None] & (o_d < D)[None, :]
        b_q = tl.load(q + o_rg[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
        b_do = tl.load(dout + o_rg[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
        # scale * q . k - lse = scale * (q . k - lse / scale): the product's sum begins with -lse / scale.
        # Rows that are not there, and queries that see nothing, get probability 0 from -lse = -inf. lse, mask
        # and delta are the products' initial values: beside them they would take as many registers as scores.
        b_lse = tl.load(lse + o_rg, mask=m_row, other=float("-inf"))
        m_row = b_lse > float("-inf")
        b_s = tl.where(m_row, b_lse * minus_inverse_scale, float("-inf"))[None, :]
        b_s = b_s + tl.zeros([BP, ROWS], dtype=tl.float32)
        if MASKED:
            query = row // M
            m_s = visible_tokens(
                position, window_start, sink_stop, query[None, :], first_token, o_b[:, None], WINDOWED
            )
            b_s = tl.where(m_s, b_s, float("-inf"))
        if B % BP != 0:
            b_s = tl.where((o_b < B)[:, None], b_s, float("-inf"))
        # [BP, ROWS], log2 of the probabilities
        b_s = tl.dot(b_k, tl.trans(b_q), b_s, input_precision="ieee") * scale_log2
        b_p = tl.exp2(b_s)
        if WITH_TEACHER:
            o_query = first + tl.arange(0, ROWS // GP)
            m_query = o_query < stop
            # one pair per query here, where `pair` above has one per row of the tile
            query_pair = tl.load(order + o_query, mask=m_query, other=0)
            b_t = b_p
            if SOFTENED:
                norm = tl.load(lse_teacher + o_rg, mask=m_row, other=float("inf"))
                shift = tl.where(m_row, (b_lse * inverse_temperature - norm) * LOG2E, float("-inf"))
                b_t = tl.exp2(b_s * inverse_temperature + shift[None, :])
            # [BP, ROWS // GP]
            b_t = tl.sum(tl.reshape(b_t, [BP, ROWS // GP, GP]), 2) * (1.0 / G)
            p_t = teacher_part + query_pair[None, :] * B + o_b[:, None]
            tl.store(p_t, b_t, mask=m_query[None, :] & (o_b < B)[:, None], cache_modifier=".cs")
        # From here on p in the dtype of the products: half the registers while dp is formed.
        b_p = b_p.to(b_do.dtype)
        if WITH_DV:
            b_dv = tl.dot(b_p, b_do, b_dv, input_precision="ieee")
        if WITH_DK:
            b_delta = tl.load(delta + o_rg, mask=m_row, other=0.0)
            # dp - delta in one: the product's sum begins with -delta
            b_dp = tl.zeros([BP, ROWS], dtype=tl.float32) - b_delta[None, :]
            b_dp = tl.dot(b_v, tl.trans(b_do), b_dp, input_precision="ieee")
            b_ds = (b_p.to(tl.float32) * b_dp).to(b_k.dtype)
            b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")
            # formed transposed, 128 rows high, then turned: see README.md
            b_dq = tl.trans(tl.dot(b_kt, b_ds, input_precision="ieee"))
            p_dq = dq_part + (pair * G + head)[:, None] * D + o_d[None, :]
            if ADD_DQ:
                b_dq += tl.load(p_dq, mask=m_q, other=0.0).to(tl.float32)
            # read once, much later: not at the cost of rows of q and dout in the cache
            tl.store(p_dq, b_dq.to(dq_part.dtype.element_ty), mask=m_q, cache_modifier=".cs")
    # Places of split lists hold nothing yet.
    num_add = (split < 0).to(tl.int32) * B
    if WITH_DK:
        store_gradient(p_dkv, b_dk * scale, o_b, num_add, B, D, DP, ADD)
    if WITH_DV:
        store_gradient(p_dkv + B * D, b_dv, o_b, num_add, B, D, DP, ADD)


@triton.jit
def kl_backward_kernel(
    q_index,  # [R, Di]
    k_index,  # [NB, B, Di]
    lse_index,  # [R] fp32
    teacher_part,  # [P, B] fp32
    block,  # [N] int64
    position,  # [T] int64
    window_start,  # [T] int64
    sink_stop,  # [T] int64
    order,  # [P] int32
    item_physical_block,  # [I] int32
    item_begin,  # [I] int64
    item_stop,  # [I] int64
    num_items,  # [1] int64
    item_split,  # [I] int64
    dq_part,  # [P, Di], dtype of q_index
    kl_part,  # [I] fp32; not looked at without WITH_VALUE
    dk_index,  # [N, B, Di] fp32
    dk_part,  # [splits, B, Di] fp32
    scale,  # factor of the gradients: weight * index_scale
    scale_log2,
    first_key,  # of the part of the block that this launch works on, BP keys long
    M: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    DP: tl.constexpr,
    BP: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    WITH_VALUE: tl.constexpr,
    ADD: tl.constexpr,
    ADD_DQ: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Serve one item of the KL loss: student - teacher times index keys and queries; WITH_VALUE: its value.

    ADD and ADD_DQ: earlier launches have left a sum in dk_index, and in dq_part.
    """
    LN2: tl.constexpr = 0.6931471805599453
    LOG2_FLOOR: tl.constexpr = -1e30
    item = tl.program_id(0)
    if item >= tl.load(num_items):
        return
    physical_block = tl.load(item_physical_block + item).to(tl.int64)
    begin = tl.load(item_begin + item).to(tl.int32)
    stop = tl.load(item_stop + item).to(tl.int32)
    block_id = tl.load(block + physical_block)
    o_b = first_key + tl.arange(0, BP)
    o_d = tl.arange(0, DP)
    o_row = tl.arange(0, ROWS)
    o_bd = o_b[:, None] * D + o_d[None, :]
    m_bd = (o_b < B)[:, None] & (o_d < D)[None, :]
    b_k = tl.load(k_index + block_id * (B * D) + o_bd, mask=m_bd, other=0.0)
    b_kt = tl.trans(b_k)
    b_dk = tl.zeros([BP, DP], dtype=tl.float32)
    b_kl = tl.zeros([BP, ROWS], dtype=tl.float32)
    for first in tl.range(begin, stop, ROWS, num_stages=STAGES):
        place = first + o_row
        m_row = place < stop
        pair = tl.load(order + place, mask=m_row, other=0)
        row = pair // K
        m_q = m_row[:, None] & (o_d < D)[None, :]
        b_q = tl.load(q_index + row[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
        b_lse = tl.load(lse_index + row, mask=m_row, other=float("inf"))
        # +inf: probability 0, also for a query that sees nothing
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
        m_t = m_row[:, None] & (o_b < B)[None, :]
        b_t = tl.load(teacher_part + pair[:, None] * B + o_b[None, :], mask=m_t, other=0.0)
        # [BP, ROWS], log2 of the student
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2
        if MASKED:
            query = row // M
            m_s = visible_tokens(
                position, window_start, sink_stop, query[None, :], block_id * B, o_b[:, None], WINDOWED
            )
            b_s = tl.where(m_s, b_s, float("-inf"))
        if B % BP != 0:
            b_s = tl.where((o_b < B)[:, None], b_s, float("-inf"))
        b_s = b_s - (b_lse * LOG2E)[None, :]
        b_t = tl.trans(b_t)
        if WITH_VALUE:
            # Where the teacher is 0 the term is 0: both logarithms are made finite, NaN excepted.
            log_student = tl.maximum(b_s, LOG2_FLOOR, propagate_nan=tl.PropagateNan.ALL)
            b_kl += b_t * (log2_approx(b_t) - log_student)
        b_ds = (tl.exp2(b_s) - b_t).to(b_k.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")
        b_dq = tl.trans(tl.dot(b_kt, b_ds, input_precision="ieee"))
        p_dq = dq_part + pair[:, None] * D + o_d[None, :]
        if ADD_DQ:
            b_dq += tl.load(p_dq, mask=m_q, other=0.0).to(tl.float32)
        tl.store(p_dq, b_dq.to(dq_part.dtype.element_ty), mask=m_q)
    if WITH_VALUE:
        tl.store(kl_part + item, tl.sum(tl.sum(b_kl, 1), 0) * LN2)
    split = tl.load(item_split + item)
    # after the products, where a small weight cannot underflow in 16 bits
    b_dk *= scale
    if split >= 0:
        tl.store(dk_part + split * (B * D) + o_bd, b_dk, mask=m_bd)
    else:
        p_dk = dk_index + physical_block * (B * D) + o_bd
        if ADD:
            b_dk += tl.load(p_dk, mask=m_bd, other=0.0)
        tl.store(p_dk, b_dk, mask=m_bd)


@triton.jit
def add_splits_kernel(
    part,  # [splits, size] fp32
    first_split,  # [N] int64, where the parts of a physical block begin
    num_splits,  # [N] int64, 0 for blocks whose list was not split
    total,  # [N, size] fp32
    size,
    ADD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add the parts of one block's gradient in the order of its list."""
    physical_block = tl.program_id(0).to(tl.int64)
    count = tl.load(num_splits + physical_block).to(tl.int32)
    if count == 0:
        return
    first = tl.load(first_split + physical_block)
    o = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    m = o < size
    b_sum = tl.zeros([CHUNK], dtype=tl.float32)
    for i in tl.range(0, count):
        b_sum += tl.load(part + (first + i) * size + o, mask=m, other=0.0)
    if ADD:
        b_sum += tl.load(total + physical_block * size + o, mask=m, other=0.0)
    tl.store(total + physical_block * size + o, b_sum, mask=m)


@triton.jit
def add_slots_kernel(
    used,  # [P] uint8
    part,  # [P, size]
    total,  # [R, size] fp32
    num_rows,
    scale,
    size,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the gradients of a row's used pairs by slot, times scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    m_row = row < num_rows
    m = m_row[:, None] & (o < size)[None, :]
    b_sum = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
    for slot in tl.range(0, K, num_stages=STAGES):
        pair = row * K + slot
        there = tl.load(used + pair, mask=m_row, other=0) > 0
        p_part = part + pair[:, None] * size + o[None, :]
        b_part = tl.load(p_part, mask=m & there[:, None], other=0.0, eviction_policy="evict_first")
        b_sum += b_part.to(tl.float32)
    tl.store(total + row[:, None] * size + o[None, :], b_sum * scale, mask=m)

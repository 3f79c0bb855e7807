"""Form the dense KL loss by Triton kernels: log-sum-exps, student minus teacher, both gradients.

Shapes: M KV heads, G query heads of each, Q queries, K keys, D head dim, DI index head dim; DP and DIP are
powers of two that hold the last two. Scores are kept as powers of two: scale_log2 = scale * log2(e).
Prefixes: o_ offsets, m_ masks, p_ pointers, b_ tiles.

Documents begin and end anywhere, so lengths are not specialised: Triton would compile each kernel anew for a
multiple of 16, for another number and for 1, on each rank when it first meets one.
"""

import triton
import triton.language as tl

from msa_kernels.log2 import log2_approx

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Differences are kept times this, so that small ones are normal numbers in fp16 too
DIFFERENCE_SCALE = tl.constexpr(1024.0)


@triton.jit
def load_rows(p_rows, o_row, stop, stride, D: tl.constexpr, DP: tl.constexpr):
    """Load rows o_row [N] below stop of [.., D]: [N, DP], zeros elsewhere; 64-bit offsets."""
    o_d = tl.arange(0, DP)
    source = p_rows + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(source, (o_row < stop)[:, None] & (o_d < D)[None, :], 0.0)


@triton.jit
def add_scores(
    b_q, p_k, first, o_q, num_keys, k_stride, scale_log2, peak, total,
    D: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to total * 2^peak, the sum of 2^score of each query."""
    o_k = first + tl.arange(0, KEYS)
    b_k = load_rows(p_k, o_k, num_keys, k_stride, D, DP)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
    if MASKED:
        seen = (o_k < num_keys)[None, :]
        if CAUSAL:
            seen = seen & (o_k[None, :] <= o_q[:, None])
        b_s = tl.where(seen, b_s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(b_s, 1))
    # every query sees the first key, so that peaks are finite
    total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(b_s - new_peak[:, None]), 1)
    return new_peak, total


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def lse_kernel(
    q,  # [M, G, Q, D], any strides but the last
    k,  # [M, K, D]; stride 0 over KV heads where they share keys
    lse,  # [M, G, Q] fp32
    num_queries,
    num_keys,
    scale_log2,
    q_kv_head_stride,
    q_head_stride,
    q_stride,
    k_kv_head_stride,
    k_stride,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take the log-sum-exp of a tile of queries while keys pass by; grid [tiles of queries, M * G]."""
    # the last queries see most keys: longest first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    o_q = tile * ROWS + tl.arange(0, ROWS)
    p_q = q + head // G * q_kv_head_stride + head % G * q_head_stride
    b_q = load_rows(p_q, o_q, num_queries, q_stride, D, DP)
    p_k = k + head // G * k_kv_head_stride
    stop = num_keys
    # tiles up to here are seen by every query of the tile and need no mask
    whole = num_keys // KEYS * KEYS
    if CAUSAL:
        stop = tl.minimum(num_keys, (tile + 1) * ROWS)
        whole = tl.minimum(whole, tile * ROWS // KEYS * KEYS)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in tl.range(0, whole, KEYS, num_stages=STAGES):
        peak, total = add_scores(
            b_q, p_k, first, o_q, num_keys, k_stride, scale_log2, peak, total, D, DP, KEYS, CAUSAL, False
        )
    for first in tl.range(whole, stop, KEYS, num_stages=STAGES):
        peak, total = add_scores(
            b_q, p_k, first, o_q, num_keys, k_stride, scale_log2, peak, total, D, DP, KEYS, CAUSAL, True
        )
    tl.store(lse + head * num_queries + o_q, (peak + tl.log2(total)) * LN2, o_q < num_queries)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "query_begin", "query_stop"])
def difference_kernel(
    q,  # [M, G, Q, D], any strides but the last
    k,  # [M, K, D]
    lse,  # [M, G, Q] fp32
    q_index,  # [M, Q, DI]
    k_index,  # [K, DI]
    lse_index,  # [M, Q] fp32
    difference,  # [M, C, stride], dtype of k_index, times DIFFERENCE_SCALE, C queries from query_begin on
    kl_part,  # [tiles of keys, M, C] fp32; not looked at without WITH_VALUE
    num_queries,
    num_keys,
    query_begin,
    query_stop,
    difference_stride,  # K in whole tiles; zeros behind the keys
    scale_log2,
    index_scale_log2,
    q_kv_head_stride,
    q_head_stride,
    q_stride,
    k_kv_head_stride,
    k_stride,
    q_index_kv_head_stride,
    q_index_stride,
    k_index_stride,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    WITH_VALUE: tl.constexpr,
    DI: tl.constexpr,
    DIP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Form student - teacher of one tile; grid [tiles of keys, tiles of the C queries, M].

    WITH_VALUE: and the divergence. Keys stay in shared memory while the heads' queries pass by; the heads'
    probabilities are added up in registers. Tiles of a causal part that no query sees are left as they are.
    """
    tile = tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    o_row = tile * ROWS + tl.arange(0, ROWS)
    o_q = query_begin + o_row
    m_q = o_q < query_stop
    chunk = query_stop - query_begin
    o_k = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    kl_place = (tl.program_id(0) * tl.num_programs(2) + kv_head) * chunk + o_row
    # the outer one is decided when the kernel is compiled
    if CAUSAL:  # noqa: SIM102
        if tl.program_id(0) * KEYS >= query_begin + (tile + 1) * ROWS:
            if WITH_VALUE:
                tl.store(kl_part + kl_place, tl.zeros([ROWS], tl.float32), m_q)
            return
    b_kt = tl.trans(load_rows(k + kv_head * k_kv_head_stride, o_k, num_keys, k_stride, D, DP))
    b_teacher = tl.zeros([ROWS, KEYS], tl.float32)
    for head in tl.range(0, G, num_stages=STAGES):
        p_q = q + kv_head * q_kv_head_stride + tl.cast(head, tl.int64) * q_head_stride
        b_q = load_rows(p_q, o_q, query_stop, q_stride, D, DP)
        # 2^(s * log2(e) - lse * log2(e)) = e^(s - lse)
        b_lse = tl.load(lse + (kv_head * G + head) * num_queries + o_q, m_q, 0.0) * LOG2E
        b_s = tl.dot(b_q, b_kt, input_precision="ieee")
        b_teacher += tl.exp2(b_s * scale_log2 - b_lse[:, None])
    b_qi = load_rows(q_index + kv_head * q_index_kv_head_stride, o_q, query_stop, q_index_stride, DI, DIP)
    b_ki = load_rows(k_index, o_k, num_keys, k_index_stride, DI, DIP)
    b_log = tl.dot(b_qi, tl.trans(b_ki), input_precision="ieee") * index_scale_log2
    b_log -= (tl.load(lse_index + kv_head * num_queries + o_q, m_q, 0.0) * LOG2E)[:, None]
    seen = m_q[:, None] & (o_k < num_keys)[None, :]
    if CAUSAL:
        seen = seen & (o_k[None, :] <= o_q[:, None])
    b_teacher = tl.where(seen, b_teacher * (1.0 / G), 0.0)
    if WITH_VALUE:
        # a teacher of 0 adds 0: both logarithms are finite
        b_kl = tl.sum(b_teacher * (log2_approx(b_teacher) - b_log), 1) * LN2
        tl.store(kl_part + kl_place, b_kl, m_q)
    # student - teacher, the gradient of the divergence by the student's scores
    b_ds = (tl.where(seen, tl.exp2(b_log), 0.0) - b_teacher) * DIFFERENCE_SCALE
    target = difference + (kv_head * chunk + o_row)[:, None] * difference_stride + o_k[None, :]
    tl.store(target, b_ds.to(difference.dtype.element_ty), m_q[:, None])


@triton.jit(do_not_specialize=["num_keys", "query_begin", "query_stop"])
def query_gradient_kernel(
    difference,  # [M, C, stride]
    k_index,  # [K, DI]
    dq_part,  # [splits, M, C, DI] fp32
    num_keys,
    query_begin,
    query_stop,
    difference_stride,
    split_keys,
    index_scale,
    k_index_stride,
    DI: tl.constexpr,
    DIP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply differences with index keys, split_keys of them; grid [tiles of the C queries, splits, M].

    ROWS, KEYS and CAUSAL as in `difference_kernel`: of a causal part, tiles that it left out are not read.
    split_keys is a multiple of KEYS.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    o_row = tile * ROWS + tl.arange(0, ROWS)
    chunk = query_stop - query_begin
    stop = tl.minimum(num_keys, (split + 1) * split_keys)
    if CAUSAL:
        stop = tl.minimum(stop, tl.minimum(query_stop, query_begin + (tile + 1) * ROWS))
    p_difference = difference + (kv_head * chunk + o_row)[:, None] * difference_stride
    b_dq = tl.zeros([ROWS, DIP], tl.float32)
    for first in tl.range(split * split_keys, stop, KEYS, num_stages=STAGES):
        o_k = first + tl.arange(0, KEYS)
        b_ds = tl.load(p_difference + o_k[None, :], (o_row < chunk)[:, None], 0.0)
        b_k = load_rows(k_index, o_k, num_keys, k_index_stride, DI, DIP)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision="ieee")
    o_d = tl.arange(0, DIP)
    place = (split * tl.num_programs(2) + kv_head) * chunk + o_row
    m_dq = (o_row < chunk)[:, None] & (o_d < DI)[None, :]
    tl.store(dq_part + place[:, None] * DI + o_d[None, :], b_dq * (index_scale / DIFFERENCE_SCALE), m_dq)


@triton.jit(do_not_specialize=["num_keys", "query_begin", "query_stop"])
def key_gradient_kernel(
    difference,  # [M, C, stride]
    q_index,  # [M, Q, DI]
    dk_index,  # [K, DI] fp32
    num_keys,
    query_begin,
    query_stop,
    difference_stride,
    index_scale,
    q_index_kv_head_stride,
    q_index_stride,
    M: tl.constexpr,
    DI: tl.constexpr,
    DIP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the C queries' differences times their index queries to dk_index; grid [tiles of keys].

    ROWS, KEYS and CAUSAL as in `query_gradient_kernel`.
    """
    o_k = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    chunk = query_stop - query_begin
    begin = 0
    if CAUSAL:
        # the first tile of queries that reaches beyond the first of these keys
        begin = tl.maximum(tl.program_id(0) * KEYS - query_begin, 0) // ROWS * ROWS
    b_dk = tl.zeros([KEYS, DIP], tl.float32)
    # all KV heads share the index keys, so one program adds them up, always in the same order
    for kv_head in range(M):
        p_difference = difference + tl.cast(kv_head, tl.int64) * chunk * difference_stride
        p_q = q_index + tl.cast(kv_head, tl.int64) * q_index_kv_head_stride
        for first in tl.range(begin, chunk, ROWS, num_stages=STAGES):
            o_row = first + tl.arange(0, ROWS)
            source = p_difference + o_row.to(tl.int64)[:, None] * difference_stride + o_k[None, :]
            b_ds = tl.load(source, (o_row < chunk)[:, None], 0.0)
            b_q = load_rows(p_q, query_begin + o_row, query_stop, q_index_stride, DI, DIP)
            b_dk = tl.dot(tl.trans(b_ds), b_q, b_dk, input_precision="ieee")
    o_d = tl.arange(0, DIP)
    target = dk_index + o_k.to(tl.int64)[:, None] * DI + o_d[None, :]
    m_dk = (o_k < num_keys)[:, None] & (o_d < DI)[None, :]
    b_dk = b_dk * (index_scale / DIFFERENCE_SCALE) + tl.load(target, m_dk, 0.0)
    tl.store(target, b_dk, m_dk)

"""Attend with some queries to some keys, one part of full attention, with the log-sum-exp to merge parts.

The forward of each part returns its own (out, lse). The backward takes the *merged* out and lse and gives
this part's exact share of dq and its dk, dv: with p = exp(s - lse) and delta = rowsum(dout * out), the
softmax gradient needs nothing else of the other parts. block_sparse_attention/tiled_backward.py derives it.

Shapes: M KV heads, G query heads of each, Q queries, K keys, D head dim.
"""

import torch
from torch import Tensor

_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_CUDA = torch.ops.aten._scaled_dot_product_flash_attention
_CUDA_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
_TILE = 1024


def attention_part(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with q to k, v.

    Args:
        q: [M, G, Q, D].
        k, v: [M, K, D]; each KV head's keys serve its G query heads without being copied.
        causal: query i sees keys 0..i (needs Q == K); otherwise every query sees every key.
        softmax_scale: factor of the scores.

    Returns:
        out [M, G, Q, D] in q's dtype, lse [M, G, Q] natural log, fp32 (fp64 for fp64 inputs).
    """
    k, v = _per_head(k, q), _per_head(v, q)
    if q.device.type == "cpu":
        out, lse = _CPU(q, k, v, 0.0, causal, scale=softmax_scale)
        return out, lse
    if q.dtype in (torch.float16, torch.bfloat16):
        result = _CUDA(q, k, v, 0.0, causal, False, scale=softmax_scale)
        return result[0], result[1]
    return _tiled_forward(q, k, v, causal, softmax_scale)


def attention_part_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Form gradients of one part, given the merged `out` and `lse` of all parts.

    Shapes as in `attention_part`; dout like out. Returns dq [M, G, Q, D], dk, dv [M, K, D].
    """
    k, v = _per_head(k, q), _per_head(v, q)
    if q.device.type == "cpu":
        dq, dk, dv = _CPU_BACKWARD(dout, q, k, v, out, lse, 0.0, causal, scale=softmax_scale)
    elif q.dtype in (torch.float16, torch.bfloat16):
        # Without dropout the seed and offset are read by nobody, and equal lengths need no cumulative ones.
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv = _CUDA_BACKWARD(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused,
            scale=softmax_scale,
        )  # fmt: skip
    else:
        dq, dk, dv = _tiled_backward(dout, q, k, v, out, lse, causal, softmax_scale)
    # a KV head's keys served G query heads: their gradients add up
    return dq, dk.sum(1), dv.sum(1)


def merge_parts(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the results over two disjoint sets of keys to that over their union.

    out [..., D], lse [...] each. lse = log(e^lse1 + e^lse2), out = e^(lse1-lse) out1 + e^(lse2-lse) out2.
    A part that saw no key has lse -inf and out 0 and changes nothing.

    Example: outputs 1 and 5 with lse log 3 and log 1 give lse log 4 and (3 * 1 + 1 * 5) / 4 = 2.
    """
    total = torch.logaddexp(lse, other_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    weight, other = (lse - safe).exp().unsqueeze(-1), (other_lse - safe).exp().unsqueeze(-1)
    return (out * weight + other_out * other).to(out.dtype), total


def _per_head(x: Tensor, q: Tensor) -> Tensor:
    """View [M, K, D] as [M, G, K, D]: the same keys for every query head, none of them copied."""
    return x.unsqueeze(1).expand(-1, q.shape[1], -1, -1)


def _tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attend in tiles of queries: for fp32 and fp64 on CUDA, where torch's flash kernels take 16 bit only."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for begin in range(0, q.shape[2], _TILE):
        end = min(begin + _TILE, q.shape[2])
        scores = _scores(q, k, begin, end, causal, softmax_scale)
        lse[:, :, begin:end] = scores.logsumexp(-1)
        out[:, :, begin:end] = scores.softmax(-1) @ v[:, :, : scores.shape[-1]]
    return out, lse


def _tiled_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Form dq [M, G, Q, D] and dk, dv [M, G, K, D] in tiles of queries; k and v per query head."""
    dq, dk, dv = torch.empty_like(q), q.new_zeros(k.shape), q.new_zeros(v.shape)
    # sum over all keys of p * dp, since out = sum of p * v and dp = dout . v
    delta = (dout * out).sum(-1)
    for begin in range(0, q.shape[2], _TILE):
        rows = slice(begin, min(begin + _TILE, q.shape[2]))
        scores = _scores(q, k, rows.start, rows.stop, causal, softmax_scale)
        keys = slice(0, scores.shape[-1])
        p = (scores - lse[:, :, rows, None]).exp()
        dp = dout[:, :, rows] @ v[:, :, keys].transpose(-1, -2)
        ds = p * (dp - delta[:, :, rows, None]) * softmax_scale
        # dq is whole here, as all keys of the part meet a tile of queries at once
        dq[:, :, rows] = ds @ k[:, :, keys]
        dk[:, :, keys] += ds.transpose(-1, -2) @ q[:, :, rows]
        dv[:, :, keys] += p.transpose(-1, -2) @ dout[:, :, rows]
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, begin: int, end: int, causal: bool, softmax_scale: float) -> Tensor:
    """Form scaled scores of queries begin..end: [M, G, end - begin, keys], keys up to end if causal."""
    num_keys = end if causal else k.shape[2]
    scores = (q[:, :, begin:end] @ k[:, :, :num_keys].transpose(-1, -2)) * softmax_scale
    if causal:
        future = torch.ones(end - begin, num_keys, dtype=torch.bool, device=q.device).triu_(begin + 1)
        scores.masked_fill_(future, float("-inf"))
    return scores

"""Attend in tiles of queries and keys with torch's products: on GPUs, for dtypes that no flash kernel takes.

Scores of one tile are all that is held, [M, G, TILE, TILE] three times over: 768 MiB in fp32 with 64 heads.
Keys and values are read as they are, the heads of a group side by side in one product.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from msa_kernels.full_attention.spans import pairs

TAKES_OFFSET = True
TILE = 1024


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    causal: bool,
    softmax_scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """See `op.attention_forward`: out [Q, M, G, D], lse [M, G, Q]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full((*q.shape[1:3], q.shape[0]), float("-inf"), dtype=dtype, device=q.device)
    for rows, keys, first in _tiles(cu_q, cu_k, causal):
        scores = _scores(q[rows], k[keys], first, softmax_scale)
        before, part = lse[:, :, rows], scores.logsumexp(-1)
        total = torch.logaddexp(before, part)
        # a query that sees none of these keys has -inf here, and adds nothing
        safe = total.masked_fill(total == float("-inf"), 0.0)
        p = scores.sub_(safe.unsqueeze(-1)).exp_()
        weight = (before - safe).exp()
        out[rows] = out[rows] * weight.permute(2, 0, 1).unsqueeze(-1) + _by_row(_times(p, v[keys]))
        lse[:, :, rows] = total
    return out.to(q.dtype), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    causal: bool,
    softmax_scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `op.attention_backward`; lse [M * G, Q]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k, v))
    lse = lse.view(q.shape[1], q.shape[2], -1).to(dtype)
    # sum over all keys of p * dp, since out = sum of p * v and dp = dout . v
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1).permute(1, 2, 0)
    for rows, keys, first in _tiles(cu_q, cu_k, causal):
        p = _scores(q[rows], k[keys], first, softmax_scale).sub_(lse[:, :, rows, None]).exp_()
        dv[keys] += _from_queries(p, dout[rows])
        ds = _products(dout[rows], v[keys]).sub_(delta[:, :, rows, None]).mul_(p).mul_(softmax_scale)
        del p
        dq[rows] += _by_row(_times(ds, k[keys]))
        dk[keys] += _from_queries(ds, q[rows])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _tiles(
    cu_q: Sequence[int], cu_k: Sequence[int], causal: bool
) -> Iterator[tuple[slice, slice, int | None]]:
    """Yield rows and keys of tiles, and how many of the keys the first row sees; None: all rows see all.

    Example: one span of 4 queries and 6 keys, causal, tiles of 4: rows 0..4 with keys 0..4, of which row 0
    sees 3, and with keys 4..6, of which it sees -1: the row 2 after it is the first to see one.
    """
    for queries, keys in pairs(cu_q, cu_k):
        ahead = (keys.stop - keys.start) - (queries.stop - queries.start)
        for begin in range(queries.start, queries.stop, TILE):
            end = min(begin + TILE, queries.stop)
            # keys that the last row of the tile sees, and the first one
            seen = keys.start + ahead + end - queries.start if causal else keys.stop
            for first in range(keys.start, seen, TILE):
                last = min(first + TILE, seen)
                visible = keys.start + ahead + begin - queries.start + 1 - first
                yield (
                    slice(begin, end),
                    slice(first, last),
                    None if not causal or visible >= last - first else visible,
                )


def _scores(q: Tensor, k: Tensor, first: int | None, softmax_scale: float) -> Tensor:
    """Form scaled scores [M, G, rows, keys], -inf where a row does not see a key."""
    scores = _products(q, k).mul_(softmax_scale)
    if first is not None:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(first)
        scores.masked_fill_(future, float("-inf"))
    return scores


def _products(rows: Tensor, keys: Tensor) -> Tensor:
    """Multiply rows [R, M, G, D] with keys [K, M, D]: [M, G, R, K], in fp32 at least."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    flat = rows.permute(1, 2, 0, 3).flatten(1, 2).to(dtype) @ keys.permute(1, 2, 0).to(dtype)
    return flat.view(rows.shape[1], rows.shape[2], rows.shape[0], -1)


def _times(weights: Tensor, values: Tensor) -> Tensor:
    """Sum values [K, M, D] with weights [M, G, R, K]: [M, G, R, D]."""
    flat = weights.flatten(1, 2) @ values.transpose(0, 1).to(weights.dtype)
    return flat.view(*weights.shape[:3], -1)


def _from_queries(weights: Tensor, rows: Tensor) -> Tensor:
    """Sum rows [R, M, G, D] of all heads with weights [M, G, R, K]: [K, M, D]."""
    flat = rows.permute(1, 2, 0, 3).flatten(1, 2).to(weights.dtype)
    return (weights.flatten(1, 2).transpose(1, 2) @ flat).transpose(0, 1)


def _by_row(x: Tensor) -> Tensor:
    """Turn [M, G, R, D] into [R, M, G, D]."""
    return x.permute(2, 0, 1, 3)

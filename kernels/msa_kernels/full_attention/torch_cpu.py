"""Run torch's flash kernel of the CPU, one call per pair of spans: any float dtype, K/V heads as they are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msa_kernels.full_attention.spans import pairs

# the kernel aligns causal spans at their beginnings, so only equal ones mean the same
TAKES_OFFSET = False
_FORWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    parts = [
        _FORWARD(_by_head(q[rows]), _kv(k[keys]), _kv(v[keys]), 0.0, causal, scale=softmax_scale)
        for rows, keys in _checked(cu_q, cu_k, causal)
    ]
    out = torch.cat([out.permute(2, 0, 1, 3) for out, _ in parts])
    return out, torch.cat([lse for _, lse in parts], dim=2)


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
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    lse = lse.view(q.shape[1], q.shape[2], -1)
    for rows, keys in _checked(cu_q, cu_k, causal):
        # dout, out and lse are read by their place in memory
        queries = [_by_head(dout[rows]).contiguous(), _by_head(q[rows]), _by_head(out[rows]).contiguous()]
        grads = _one_pair(queries, _kv(k[keys]), _kv(v[keys]), lse[:, :, rows], causal, softmax_scale)
        dq[rows] = grads[0].permute(2, 0, 1, 3)
        for whole, part in ((dk, grads[1]), (dv, grads[2])):
            whole[keys] = part.squeeze(1).transpose(0, 1)
    return dq, dk, dv


def _one_pair(
    queries: list[Tensor], k: Tensor, v: Tensor, lse: Tensor, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Form dq [M, G, Q, D], dk, dv [M, 1, K, D] of one pair.

    Args:
        queries: dout, q and out, [M, G, Q, D] each.
        k, v: [M, 1, K, D]. lse: [M, G, Q].
    """
    # In 16 bits the kernel adds the heads of a group up in 16 bits too, so there each head has its own call.
    step = queries[1].shape[1] if queries[1].dtype in (torch.float32, torch.float64) else 1
    parts: list[Tensor] = []
    sums: list[Tensor] = []
    for first in range(0, queries[1].shape[1], step):
        dout, q, out = (x[:, first : first + step].contiguous() for x in queries)
        share = lse[:, first : first + step].contiguous()
        dq, *grads = _BACKWARD(dout, q, k, v, out, share, 0.0, causal, scale=softmax_scale)
        parts.append(dq)
        sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else [x.to(lse.dtype) for x in grads]
    return torch.cat(parts, dim=1), sums[0], sums[1]


def _checked(cu_q: Sequence[int], cu_k: Sequence[int], causal: bool) -> Sequence[tuple[slice, slice]]:
    found = list(pairs(cu_q, cu_k))
    equal = all(rows.stop - rows.start == keys.stop - keys.start for rows, keys in found)
    assert equal or not causal, "causal spans have as many keys as queries"
    return found


def _by_head(x: Tensor) -> Tensor:
    """View [Q, M, G, D] as the kernel's batch of M with G heads: [M, G, Q, D]."""
    return x.permute(1, 2, 0, 3)


def _kv(x: Tensor) -> Tensor:
    """View [K, M, D] as a batch of M with one head, which serves all G: [M, 1, K, D]."""
    return x.transpose(0, 1).unsqueeze(1)

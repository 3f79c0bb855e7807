"""Run cuDNN's attention through torch's operator: one call per pair of spans.

torch's operator has no packed form for spans that are aligned at their ends, so few long spans suit it; with
more than MOST_PAIRS of them torch's flash kernel takes them all in one call. Both give the same numbers
within rounding, and a log-sum-exp of one kernel serves the other's backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msa_kernels.full_attention import varlen
from msa_kernels.full_attention.spans import pairs

MOST_PAIRS = 8
# torch's operator aligns causal spans at their beginnings, as scaled_dot_product_attention does
TAKES_OFFSET = False
_FORWARD: Any = torch.ops.aten._scaled_dot_product_cudnn_attention
_BACKWARD: Any = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
# dimensions of the operator's log-sum-exp, [1, heads, Q] or [1, heads, Q, 1], which its backward wants again
_seen_dims = {"lse": 4}


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
    """See `op.attention_forward`: out [Q, M, G, D], lse [M * G, Q]."""
    if len(cu_q) - 1 > MOST_PAIRS:
        return varlen.forward(q, k, v, cu_q, cu_k, causal, softmax_scale, "torch")
    outs, sums = [], []
    for rows, keys in pairs(cu_q, cu_k):
        parts = _by_head(q[rows].flatten(1, 2)), _by_head(k[keys]), _by_head(v[keys])
        # no bias; with the log-sum-exp; no dropout
        out, lse, *_ = _FORWARD(*parts, None, True, 0.0, causal, False, scale=softmax_scale)
        _seen_dims["lse"] = lse.dim()
        outs.append(out[0].transpose(0, 1))
        sums.append(lse.reshape(lse.shape[1], lse.shape[2]))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.reshape(q.shape), sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)


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
    if len(cu_q) - 1 > MOST_PAIRS:
        return varlen.backward(dout, q, k, v, out, lse, cu_q, cu_k, causal, softmax_scale, "torch")
    grads: list[list[Tensor]] = []
    # read by nobody without dropout
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    for rows, keys in pairs(cu_q, cu_k):
        dout_part, q_part, out_part = (_by_head(x[rows].flatten(1, 2)) for x in (dout, q, out))
        k_part, v_part = _by_head(k[keys]), _by_head(v[keys])
        sums = lse[None, :, rows].contiguous()
        sums = sums.unsqueeze(-1) if _seen_dims["lse"] == 4 else sums
        found = _BACKWARD(
            dout_part, q_part, k_part, v_part, out_part, sums, unused, unused, None, None, None,
            q_part.shape[2], k_part.shape[2], 0.0, causal, scale=softmax_scale,
        )  # fmt: skip
        grads.append([x[0].transpose(0, 1) for x in found])
    dq, dk, dv = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*grads, strict=True))
    return dq.reshape(q.shape), dk, dv


def _by_head(x: Tensor) -> Tensor:
    """View [rows, heads, D] as a batch of one: [1, heads, rows, D], channels contiguous."""
    return x.transpose(0, 1).unsqueeze(0)

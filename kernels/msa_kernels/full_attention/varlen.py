"""Run flash kernels of GPUs that take all pairs of spans in one call: FlashAttention 3 and 2, torch's copy.

All three read [rows, heads, D] with the channels contiguous, know groups of query heads, align causal spans
at their ends and want int32 limits on the device. Forward and backward take the libraries' low-level
functions, for the merged log-sum-exp of all parts has to be handed to the backward pass. Checked against the
sources of flash-attn 2.8 and FlashAttention 3, and torch 2.13; see tests/gpu for what shows it on a GPU.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from msa_kernels.full_attention.spans import longest, on_device

TAKES_OFFSET = True


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
    """See `op.attention_forward`; kernel: "flash3", "flash2" or "torch"."""
    out, lse = _FORWARD[kernel](_heads(q), _last(k), _last(v), _Spans(cu_q, cu_k, q), causal, softmax_scale)
    return out.view(q.shape), lse


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
    tensors = [_heads(dout), _heads(q), _last(k), _last(v), _heads(out), lse]
    dq, dk, dv = _BACKWARD[kernel](tensors, _Spans(cu_q, cu_k, q), causal, softmax_scale)
    return dq.view(q.shape), dk, dv


class _Spans:
    """Hold span limits as the libraries want them."""

    def __init__(self, cu_q: Sequence[int], cu_k: Sequence[int], q: Tensor) -> None:
        self.q, self.k = on_device(cu_q, q.device), on_device(cu_k, q.device)
        # With one query at most FA2 swaps queries and heads, and orders the log-sum-exps of several spans
        # wrongly; the number only has to be large enough.
        self.most_q, self.most_k = max(longest(cu_q), 2), longest(cu_k)


def _flash2_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: _Spans, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    function = _function("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward")
    result = function(
        q, k, v, spans.q, spans.k, spans.most_q, spans.most_k,
        dropout_p=0.0, softmax_scale=scale, causal=causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return result[0], result[1]


def _flash2_backward(
    tensors: list[Tensor], spans: _Spans, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    function = _function("flash_attn.flash_attn_interface", "_flash_attn_varlen_backward")
    grads = _empty_grads(tensors)
    function(
        *tensors, *grads, spans.q, spans.k, spans.most_q, spans.most_k,
        dropout_p=0.0, softmax_scale=scale, causal=causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return grads


def _flash3_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: _Spans, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    function = _function("flash_attn_interface", "_flash_attn_forward")
    result = function(
        q, k, v, cu_seqlens_q=spans.q, cu_seqlens_k=spans.k,
        max_seqlen_q=spans.most_q, max_seqlen_k=spans.most_k, softmax_scale=scale, causal=causal,
    )  # fmt: skip
    return result[0], result[1]


def _flash3_backward(
    tensors: list[Tensor], spans: _Spans, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    function = _function("flash_attn_interface", "_flash_attn_backward")
    grads = _empty_grads(tensors)
    # the name of this argument changed between releases
    mask = {"is_causal" if "is_causal" in _parameters(function) else "causal": causal}
    function(
        *tensors, cu_seqlens_q=spans.q, cu_seqlens_k=spans.k,
        max_seqlen_q=spans.most_q, max_seqlen_k=spans.most_k,
        dq=grads[0], dk=grads[1], dv=grads[2], softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(), **mask,
    )  # fmt: skip
    return grads


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: _Spans, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    result = torch.ops.aten._flash_attention_forward(
        q, k, v, spans.q, spans.k, spans.most_q, spans.most_k, 0.0, causal, False, scale=scale
    )
    return result[0], result[1]


def _torch_backward(
    tensors: list[Tensor], spans: _Spans, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # without dropout nobody reads the state of the random numbers
    device = spans.q.device
    state, unused = torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)
    return torch.ops.aten._flash_attention_backward(
        *tensors, spans.q, spans.k, spans.most_q, spans.most_k, 0.0, causal, state, unused, scale=scale
    )


_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "flash2": _flash2_forward,
    "flash3": _flash3_forward,
    "torch": _torch_forward,
}
_BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "flash2": _flash2_backward,
    "flash3": _flash3_backward,
    "torch": _torch_backward,
}


@cache
def _function(module: str, name: str) -> Callable[..., Any]:
    """Import a function of a library; looked up once."""
    return getattr(importlib.import_module(module), name)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """List the arguments of a library's function, which may be wrapped as a custom operator."""
    return frozenset(inspect.signature(getattr(function, "_init_fn", function)).parameters)


def _empty_grads(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Make memory for dq, dk, dv, in order whatever the order of q, k, v is."""
    dq, dk, dv = (x.new_empty(x.shape) for x in tensors[1:4])
    return dq, dk, dv


def _heads(x: Tensor) -> Tensor:
    """View queries [Q, M, G, D] as [Q, M * G, D]: the heads of one KV head lie side by side."""
    return _last(x.flatten(1, 2))


def _last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()

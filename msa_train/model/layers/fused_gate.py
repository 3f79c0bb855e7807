"""Apply the gate of feed-forward layers and experts in one pass over memory each way.

Kept for the backward pass is the input alone; plain autograd keeps clamped halves, the sigmoid and products.

Shapes: R rows, F width inside a feed-forward network or expert.
"""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from msa_train.config import Activation
from msa_train.model.layers.fusion import fused
from msa_train.model.transformer_config import MsaTransformerConfig

# of swiglu_oai
_LIMIT, _ALPHA, _OFFSET = 7.0, 1.702, 1.0


def fused_gate(hidden: Tensor, scale: Tensor | None, *, is_oai: bool) -> Tensor:
    """Gate rows: hidden [R, 2 F], gate before up, and their scales [R] -> [R, F] in hidden's dtype.

    Args:
        hidden: of the first product.
        scale: probability of each row's expert, any float dtype; None: 1.
        is_oai: swiglu_oai: (clamp(up, +-7) + 1) * g * sigmoid(1.702 g), g = min(gate, 7); else swiglu.
    """
    return _Gate.apply(hidden, scale, is_oai)  # type: ignore[return-value]


class FusedGate(MegatronModule):
    """Stand where Megatron's feed-forward modules take an activation for the whole first product."""

    def __init__(self, config: MsaTransformerConfig) -> None:
        super().__init__(config)
        self.is_oai = config.model.activation is Activation.swiglu_oai

    def forward(self, hidden: Tensor) -> Tensor:
        """Gate [T, 1, 2 F] -> [T, 1, F]."""
        return fused_gate(hidden, None, is_oai=self.is_oai)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, scale: Tensor | None, is_oai: bool) -> Tensor:
        ctx.is_oai = is_oai
        if scale is None:
            ctx.save_for_backward(hidden)
            return _gate(hidden, is_oai)
        ctx.save_for_backward(hidden, scale)
        return _gate_scaled(hidden, scale, is_oai)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *scale = ctx.saved_tensors
        if not scale:
            return _gate_grad(grad, hidden, ctx.is_oai), None, None
        return *_gate_scaled_grad(grad, hidden, scale[0], ctx.is_oai), None


def _halves(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return gate and up [R, F], wide."""
    gate, up = hidden.chunk(2, dim=-1)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return gate.to(dtype), up.to(dtype)


def _inner(gate: Tensor, up: Tensor, is_oai: bool) -> Tensor:
    if not is_oai:
        return gate * torch.sigmoid(gate) * up
    gate = gate.clamp(max=_LIMIT)
    return gate * torch.sigmoid(_ALPHA * gate) * (up.clamp(-_LIMIT, _LIMIT) + _OFFSET)


def _inner_grad(grad: Tensor, gate: Tensor, up: Tensor, is_oai: bool) -> Tensor:
    """Bring a wide gradient [R, F] back to hidden [R, 2 F]."""
    if not is_oai:
        share = torch.sigmoid(gate)
        of_gate = grad * up * share * (1 + gate * (1 - share))
        return torch.cat((of_gate, grad * gate * share), dim=-1)
    # at the limits themselves the gradient passes, as in torch's clamp
    of_gate_passes, of_up_passes = gate <= _LIMIT, (up >= -_LIMIT) & (up <= _LIMIT)
    gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT) + _OFFSET
    share = torch.sigmoid(_ALPHA * gate)
    of_gate = grad * up * share * (1 + _ALPHA * gate * (1 - share)) * of_gate_passes
    return torch.cat((of_gate, grad * gate * share * of_up_passes), dim=-1)


@fused
def _gate(hidden: Tensor, is_oai: bool) -> Tensor:
    return _inner(*_halves(hidden), is_oai).to(hidden.dtype)


@fused
def _gate_grad(grad: Tensor, hidden: Tensor, is_oai: bool) -> Tensor:
    gate, up = _halves(hidden)
    return _inner_grad(grad.to(gate.dtype), gate, up, is_oai).to(hidden.dtype)


@fused
def _gate_scaled(hidden: Tensor, scale: Tensor, is_oai: bool) -> Tensor:
    return (_inner(*_halves(hidden), is_oai) * scale.unsqueeze(-1)).to(hidden.dtype)


@fused
def _gate_scaled_grad(grad: Tensor, hidden: Tensor, scale: Tensor, is_oai: bool) -> tuple[Tensor, Tensor]:
    gate, up = _halves(hidden)
    wide, factor = grad.to(gate.dtype), scale.to(gate.dtype).unsqueeze(-1)
    of_scale = (wide * _inner(gate, up, is_oai)).sum(-1).to(scale.dtype)
    return _inner_grad(wide * factor, gate, up, is_oai).to(hidden.dtype), of_scale

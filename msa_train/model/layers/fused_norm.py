"""Normalise, and rotate heads, in one pass over memory each way: what `norm` and `rotary` do, fused.

Kept for the backward pass are the input in its own dtype and one fp32 number a row, compiled or not; plain
autograd keeps the input and its normalised values in fp32. All is computed in fp32 and rounded once, so a
rotated head is not rounded between norm and rotation.

Shapes: T tokens, D channels that are normalised together, `...` heads.
"""

from typing import Any

import torch
from torch import Tensor

from msa_train.model.layers.fusion import fused


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float, *, zero_centered: bool) -> Tensor:
    """Normalise x [T, ..., D] by weight [D], or 1 + weight; x's dtype back."""
    return _Norm.apply(x, weight, None, eps, zero_centered, True)  # type: ignore[return-value]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, zero_centered: bool) -> Tensor:
    """Do what `fused_rms_norm` does by operators of torch, one after the other."""
    return _Norm.apply(x, weight, None, eps, zero_centered, False)  # type: ignore[return-value]


def fused_norm_rotary(
    x: Tensor, weight: Tensor, table: tuple[Tensor, Tensor], eps: float, *, zero_centered: bool
) -> Tensor:
    """Normalise heads x [T, ..., D] and rotate their first channels by the table's angles."""
    return _Norm.apply(x, weight, table, eps, zero_centered, True)  # type: ignore[return-value]


def fused_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first channels of x [T, ..., D] by the table's angles, see `rotary.apply_rotary`."""
    return _Rotary.apply(x, table)  # type: ignore[return-value]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        table: tuple[Tensor, Tensor] | None,
        eps: float,
        zero_centered: bool,
        is_compiled: bool,
    ) -> Tensor:
        if table is None:
            norm = _norm if is_compiled else _norm.__wrapped__
            out, scale = norm(x, weight, eps, zero_centered)
        else:
            out, scale = _norm_rotary(x, weight, *table, eps, zero_centered)
        ctx.save_for_backward(x, weight, scale, *(table or ()))
        ctx.zero_centered, ctx.is_compiled = zero_centered, is_compiled
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, *table = ctx.saved_tensors
        if table:
            cos, sin = table
            grad_x, grad_weight = _norm_rotary_grad(grad, x, weight, scale, cos, sin, ctx.zero_centered)
        else:
            norm_grad = _norm_grad if ctx.is_compiled else _norm_grad.__wrapped__
            grad_x, grad_weight = norm_grad(grad, x, weight, scale, ctx.zero_centered)
        return grad_x, grad_weight, None, None, None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        ctx.save_for_backward(*table)
        return _rotary(x, *table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotary_back(grad, cos, sin), None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scaled(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) * weight and 1 / rms(x) [T, ..., 1], both wide."""
    wide = x.to(_wide(x))
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return wide * scale * _factor(weight, wide.dtype, zero_centered), scale


def _factor(weight: Tensor, dtype: torch.dtype, zero_centered: bool) -> Tensor:
    return weight.to(dtype) + 1 if zero_centered else weight.to(dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate wide x [T, ..., D] by angles [T, R / 2]; a negative sine turns back."""
    shape = (cos.shape[0], *(1,) * (x.dim() - 2), cos.shape[1])
    cos, sin, half = cos.view(shape), sin.view(shape), cos.shape[1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]), dim=-1)


def _scaled_grad(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Bring a wide gradient back through `_scaled`: gradients of x and weight in their dtypes.

    In the order of operations that autograd has for torch's own norm: these are its gradients to the bit.
    """
    wide = x.to(grad.dtype)
    of_normal = grad * _factor(weight, grad.dtype, zero_centered)
    grad_weight = (grad * (wide * scale)).sum(tuple(range(x.dim() - 1)))
    of_mean = -0.5 * (of_normal * wide).sum(-1, keepdim=True) * scale.pow(3) / x.shape[-1]
    grad_x = of_normal * scale + of_mean * (2.0 * wide)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@fused
def _norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    out, scale = _scaled(x, weight, eps, zero_centered)
    return out.to(x.dtype), scale


@fused
def _norm_grad(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    return _scaled_grad(grad.to(scale.dtype), x, weight, scale, zero_centered)


@fused
def _norm_rotary(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    out, scale = _scaled(x, weight, eps, zero_centered)
    return _turned(out, cos, sin).to(x.dtype), scale


@fused
def _norm_rotary_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    zero_centered: bool,
) -> tuple[Tensor, Tensor]:
    return _scaled_grad(_turned(grad.to(scale.dtype), cos, -sin), x, weight, scale, zero_centered)


@fused
def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turned(x.to(cos.dtype), cos, sin).to(x.dtype)


@fused
def _rotary_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turned(grad.to(cos.dtype), cos, -sin).to(grad.dtype)

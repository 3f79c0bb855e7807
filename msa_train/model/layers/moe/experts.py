"""Compute the experts of a rank by grouped products: one for all experts instead of one for each.

The parameters stay those of Megatron's SequentialMLP, a pair of matrices for each expert: names, checkpoints,
optimizers, gradient buffers and the drawing of weights do not know how they are multiplied. A grouped product
wants them in one tensor [L, out, in]. engine=torch lays them so; Megatron's buffers have their own order, and
there they are copied into one tensor for each pass over a layer. The copy is shared by all tiles; M3's 2
experts of 128 on 64 ranks have 216 MiB in bf16, which by arithmetic takes 0.15 ms at 3 TB/s, where the
products of 65,536 rows take 10 ms at 700 TFLOP/s.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from msa_train.model.layers.fused_gate import fused_gate

GroupedMm = Callable[..., Tensor]


def grouped_mm_for(device: torch.device, dtype: torch.dtype) -> GroupedMm | None:
    """Choose the grouped product: torch's, where it is one on this device; None: one product an expert.

    On GPUs torch has a kernel for bf16 alone; for other dtypes its own loop waits for the device to learn the
    offsets, which ours, knowing them on the host, need not. On CPUs it takes fp32, bf16 and fp16. fp64 has
    none anywhere.
    """
    # torch before 2.10 has it under a name of its own.
    grouped = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    if device.type != "cpu":
        kinds = (torch.bfloat16,)
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return None
    return grouped if dtype in kinds else None


class GroupedExperts(SequentialMLP):
    """Run the experts of this rank over rows sorted by expert.

    Shapes: R rows, H width, F width inside an expert, L experts.
    """

    config: TransformerConfig

    @torch.no_grad()
    def lay_together(self) -> None:
        """Move the weights into one tensor for each of the two kinds of matrix, so that no pass copies them.

        For engines that leave parameters where they are; afterwards each is a view of the whole. Meanwhile
        one of the two tensors of a layer is there twice.
        """
        first, second = self.matrices()
        if grouped_mm_for(first[0].device, first[0].dtype) is None:
            return
        for matrices in (first, second):
            together = torch.stack([matrix.detach() for matrix in matrices])
            for matrix, place in zip(matrices, together, strict=True):
                matrix.data = place

    def stacked(self) -> list[Tensor] | None:
        """Put the weights together: [L, 2 F, H] and [L, H, F]; None where experts run one by one.

        Differentiable where gradients are recorded.
        """
        first, second = self.matrices()
        if grouped_mm_for(first[0].device, first[0].dtype) is None:
            return None
        for expert in self.local_experts.children():
            for linear in expert.children():
                _await_weights(linear)
        return [_Stack.apply(*first), _Stack.apply(*second)]  # type: ignore[list-item]

    def matrices(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """List the first and the second matrix of each expert."""
        experts: Any = self.local_experts
        return [e.linear_fc1.weight for e in experts], [e.linear_fc2.weight for e in experts]

    def compute(
        self, weights: list[Tensor] | None, rows: Tensor, probs: Tensor, offsets: Tensor, counts: list[int]
    ) -> Tensor:
        """Compute all experts: rows [R, H] -> [R, H], each output times its probability.

        Args:
            weights: of `stacked`.
            rows: sorted by expert.
            probs: [R] in the router's dtype.
            offsets: [L] int32 on the device, row after the last one of each expert.
            counts: [L] rows of each expert.
        """
        if weights is None:
            parts = zip(self.local_experts, rows.split(counts), probs.split(counts), strict=True)
            return torch.cat([expert(part, scale)[0] for expert, part, scale in parts])
        hidden = _GroupedLinear.apply(rows, weights[0], offsets)
        inner = gated_activation(self.config, hidden, probs)  # type: ignore[arg-type]
        return _GroupedLinear.apply(inner, weights[1], offsets)  # type: ignore[return-value]

    def gradients(
        self, weights: list[Tensor] | None, arrived: list[Tensor], offsets: Tensor, counts: list[int]
    ) -> tuple[Tensor, Tensor, list[tuple[nn.Parameter, Tensor]]]:
        """Compute gradients from the input alone, nothing kept from a forward pass.

        The second product of the forward pass is not made again: its result is not needed.

        Args:
            weights: as for `compute`.
            arrived: rows and probs as for `compute`, and gradients [R, H] of the outputs. Emptied, so that
                each ends as soon as it is no longer needed.
            offsets: as for `compute`.
            counts: as for `compute`.

        Returns:
            Gradients of rows and probs, and of the weights that learn.
        """
        rows, probs, grad = arrived
        arrived.clear()
        if weights is None:
            return self._sequential_gradients(rows, probs, grad, offsets, counts)
        first, second = self.matrices()
        hidden = grouped_linear(rows, weights[0], offsets).requires_grad_()
        scale = probs.detach().requires_grad_()
        with torch.enable_grad():
            inner = gated_activation(self.config, hidden, scale)
        found: list[tuple[nn.Parameter, Tensor]] = []
        if second[0].requires_grad:
            found += zip(second, grouped_weight_grad(grad, inner.detach(), offsets), strict=True)
        grad_inner = grouped_transposed(grad, weights[1], offsets)
        del grad
        grad_hidden, grad_probs = torch.autograd.grad(inner, (hidden, scale), grad_inner)
        del inner, grad_inner, hidden
        if first[0].requires_grad:
            found += zip(first, grouped_weight_grad(grad_hidden, rows, offsets), strict=True)
        del rows
        return grouped_transposed(grad_hidden, weights[0], offsets), grad_probs, found

    def _sequential_gradients(
        self, rows: Tensor, probs: Tensor, grad: Tensor, offsets: Tensor, counts: list[int]
    ) -> tuple[Tensor, Tensor, list[tuple[nn.Parameter, Tensor]]]:
        inputs = rows.detach().requires_grad_(), probs.detach().requires_grad_()
        parameters = [p for p in self.parameters() if p.requires_grad]
        with torch.enable_grad():
            out = self.compute(None, *inputs, offsets, counts)
        found = torch.autograd.grad(out, (*inputs, *parameters), grad)
        return found[0], found[1], list(zip(parameters, found[2:], strict=True))


def _await_weights(module: nn.Module) -> None:
    """Run what runs before a module does, as here its weight is read and the module is not run.

    Megatron gathers updated weights under the forward pass, and waits for them in these hooks.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def gated_activation(config: TransformerConfig, hidden: Tensor, probs: Tensor) -> Tensor:
    """Apply the gate and the probability: hidden [R, 2 F], probs [R] -> [R, F], as Megatron's MLP does."""
    if getattr(config, "is_fused", False):
        return fused_gate(hidden, probs, is_oai=config.activation_func_clamp_value is not None)
    gate, up = hidden.chunk(2, dim=-1)
    limit = config.activation_func_clamp_value
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    inner = config.activation_func(gate) * (up + config.glu_linear_offset)
    return (inner * probs.unsqueeze(-1)).to(hidden.dtype)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each group of rows by its matrix: [R, in], [L, out, in] -> [R, out]."""
    return _grouped(rows, weight.transpose(1, 2), offsets, (rows.shape[0], weight.shape[1]))


def grouped_transposed(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Bring gradients back through `grouped_linear`: [R, out], [L, out, in] -> [R, in]."""
    return _grouped(grad.contiguous(), weight, offsets, (grad.shape[0], weight.shape[2]))


def grouped_weight_grad(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """Compute the gradient of the weights: [R, out], [R, in] -> [L, out, in]."""
    shape = len(offsets), grad.shape[1], rows.shape[1]
    # Columns of the one and rows of the other are cut: in these two layouts groups of any size are aligned.
    return _grouped(grad.contiguous().t(), rows.contiguous(), offsets, shape)


def _grouped(one: Tensor, other: Tensor, offsets: Tensor, shape: Sequence[int]) -> Tensor:
    grouped = grouped_mm_for(one.device, one.dtype)
    assert grouped is not None, "asked before the weights were put together"
    if one.numel() == 0 or other.numel() == 0:
        return one.new_zeros(shape)
    return grouped(one, other, offs=offsets)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        return grouped_linear(rows, weight, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, offsets = ctx.saved_tensors
        needs_rows, needs_weight, _ = ctx.needs_input_grad
        return (
            grouped_transposed(grad, weight, offsets) if needs_rows else None,
            grouped_weight_grad(grad, rows, offsets) if needs_weight else None,
            None,
        )


class _Stack(torch.autograd.Function):
    """Put matrices of one shape together; no copy where they lie at equal distances in one storage."""

    @staticmethod
    def forward(ctx: Any, *matrices: Tensor) -> Tensor:
        return _evenly_spaced(matrices) if _are_evenly_spaced(matrices) else torch.stack(matrices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.unbind()


def _are_evenly_spaced(matrices: Sequence[Tensor]) -> bool:
    first = matrices[0]
    storages = {m.untyped_storage()._cdata for m in matrices}
    if len(storages) > 1 or not all(m.is_contiguous() for m in matrices):
        return False
    starts = [m.storage_offset() for m in matrices]
    steps = {after - before for before, after in pairwise(starts)} or {first.numel()}
    return len(steps) == 1 and min(steps) >= first.numel()


def _evenly_spaced(matrices: Sequence[Tensor]) -> Tensor:
    first = matrices[0].detach()
    step = matrices[1].storage_offset() - first.storage_offset() if len(matrices) > 1 else first.numel()
    return first.as_strided((len(matrices), *first.shape), (step, *first.stride()))

"""Normalise by root mean square in fp32, with ordinary or zero-centred (1 + w) weights."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from msa_train.model.layers.fused_norm import fused_norm_rotary, fused_rms_norm, fused_rotary, rms_norm
from msa_train.model.layers.rotary import apply_rotary


class RMSNorm(nn.Module):
    """Compute x * rsqrt(mean(x^2) + eps) * w, or * (1 + w) with `layernorm_zero_centered_gamma`.

    Takes the place of Megatron's norm, which refuses RMS normalisation with sequence parallelism or
    zero-centred weights unless Transformer Engine is there.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.is_fused: bool = getattr(config, "is_fused", False)
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        # With sequence parallelism every tensor-parallel rank sees other tokens: gradients are summed.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.run: Callable[[RMSNorm, Tensor], Tensor] | None = None
        "takes the place of `normalise` during a layer's call, where outputs are not kept"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., hidden_size] of any float dtype; same shape and dtype back."""
        return self.normalise(x) if self.run is None else self.run(self, x)

    def normalise(self, x: Tensor) -> Tensor:
        """Do what `forward` does, kept by autograd as usual."""
        run = fused_rms_norm if self.is_fused else rms_norm
        return run(x, self.weight, self.eps, zero_centered=self.zero_centered)


def norm_and_rotate(
    norm: RMSNorm | None, x: Tensor, table: tuple[Tensor, Tensor], *, is_fused: bool
) -> Tensor:
    """Normalise heads x [T, ..., D], each alone or all together as wide as the norm is, and rotate them.

    Args:
        norm: of D numbers, or of all heads' together; None: none.
        x: queries or keys.
        table: cos and sin of the tokens, see `rotary.rotary_table`.
        is_fused: by compiled kernels.
    """
    if norm is not None and is_fused and norm.weight.numel() == x.shape[-1]:
        return fused_norm_rotary(x, norm.weight, table, norm.eps, zero_centered=norm.zero_centered)
    if norm is not None:
        x = norm(x) if norm.weight.numel() == x.shape[-1] else norm(x.flatten(1)).view_as(x)
    return fused_rotary(x, table) if is_fused else apply_rotary(x, table)

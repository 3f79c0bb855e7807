"""Clip and update for Megatron's distributed optimizer, in pieces and with small states, without copies.

Megatron would copy the gradients of a rank's shards to fp32 (4 bytes per sharded parameter where the buffer
is bf16) and scale whole tensors; its inner AdamW makes temporaries of all second moments. Here the inner
optimizer is `TiledAdamW`, which reads gradients where Megatron's buffers have them. Shards, fp32 weights, the
copy to the model's weights and their gathering are Megatron's.

With fp32 gradients and moments all results are Megatron's with torch's AdamW, bit for bit. Where Transformer
Engine or Apex is installed, whose AdamW is fused, that stays the inner optimizer of the default settings.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from msa_train.config import GradsDtype, MomentsDtype, OptimConfig
from msa_train.config.optimizer_bytes import PIECE_ELEMENTS
from msa_train.training.optim.tiled_adamw import TiledAdamW


class MegatronUpdate:
    """Step the parts of Megatron's optimizer: dense parameters and experts."""

    def __init__(self, optimizer: Any, parts: Sequence[Any], optim: OptimConfig) -> None:
        """Replace the inner optimizers of `parts`, none of which has made an update.

        Args:
            optimizer: Megatron's, of all parts.
            parts: its distributed optimizers.
            optim: the settings.
        """
        self.optimizer, self.parts, self.optim = optimizer, parts, optim
        for part in parts:
            part.optimizer = TiledAdamW.replacing(
                part.optimizer,
                moments_dtype=optim.moments_dtype,
                offload=optim.offload,
                # shards of fp32 weights are views of the weights themselves and stay
                copies=[shard for shards in part.shard_fp32_from_float16_groups for shard in shards],
            )
            part.init_state_fn = _allocate

    @staticmethod
    def is_for(optim: OptimConfig, parts: Sequence[Any]) -> bool:
        """Tell whether this is to be used: not where a fused AdamW does what the defaults ask for."""
        is_default = (
            optim.moments_dtype is MomentsDtype.fp32
            and optim.grads_dtype is GradsDtype.fp32
            and not optim.offload
        )
        return not is_default or all(type(part.optimizer) is torch.optim.AdamW for part in parts)

    @torch.no_grad()
    def prepare(self) -> float:
        """Hand the gradients to the inner optimizers and return their global norm, the same on all ranks."""
        for part in self.parts:
            for models, shards in (
                (part.model_float16_groups, part.shard_fp32_from_float16_groups),
                (part.model_fp32_groups, part.shard_fp32_groups),
            ):
                for model_group, shard_group in zip(models, shards, strict=True):
                    for parameter, shard in zip(model_group, shard_group, strict=True):
                        place = part._get_model_param_range_map(parameter)["param"]
                        shard.decoupled_grad = parameter.main_grad.view(-1)[place.start : place.end]
        return self._norm()

    @torch.no_grad()
    def step(self, norm: float) -> None:
        """Clip by the norm that `prepare` gave, update, and bring the new weights to the model."""
        factor = self.optim.clip_grad / (norm + 1e-6) if self.optim.clip_grad > 0 else 1.0
        for part in self.parts:
            part.optimizer.gradient_factor = min(factor, 1.0)
            for gradient in _gradients(part) if factor < 1 else []:
                # bf16 would be rounded once more, so the update scales that
                if gradient.dtype == torch.float32:
                    gradient.mul_(factor)
        self.optimizer.step_with_ready_grads()

    def _norm(self) -> float:
        """Return the norm as Megatron's optimizers do."""
        # ranks without parameters of a part take part in its sum
        everything = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        groups = [part.get_grad_stats_parallel_group() for part in everything]
        counted = [_norm_terms(part) if part in self.parts else [] for part in everything]
        if all(group == groups[0] for group in groups):
            terms = [term for part in counted for term in part]
            return float(get_grad_norm_fp32(terms, grad_stats_parallel_group=groups[0]))
        norms = [
            float(get_grad_norm_fp32(terms, grad_stats_parallel_group=group))
            for terms, group in zip(counted, groups, strict=True)
        ]
        return math.sqrt(sum(norm**2 for norm in norms))


def _allocate(optimizer: TiledAdamW, _config: Any = None) -> None:
    optimizer.allocate()


def _gradients(part: Any) -> list[Tensor]:
    """List the gradients of a part's shards, views of the buffer."""
    return [shard.decoupled_grad for group in part.optimizer.param_groups for shard in group["params"]]


def _norm_terms(part: Any) -> list[Tensor]:
    """List tensors whose norm together is that of a part's gradients, each parameter counted on one rank."""
    terms: list[Tensor] = []
    for group in part.optimizer.param_groups:
        for shard in group["params"]:
            is_counted = param_is_not_shared(shard) and param_is_not_tensor_parallel_duplicate(
                shard, getattr(part, "tp_group", None)
            )
            if not is_counted:
                continue
            if shard.decoupled_grad.dtype == torch.float32:
                terms.append(shard.decoupled_grad)
                continue
            # Megatron's norm of a bf16 tensor would be bf16: it gets the norms of pieces instead
            terms += [piece.float().norm()[None] for piece in shard.decoupled_grad.split(PIECE_ELEMENTS)]
    return terms

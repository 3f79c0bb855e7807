"""Route tokens to experts on any device: sigmoid scores, a bias that balances them, padding to no expert.

Megatron's own router places buffers on CUDA and counts padding; the arithmetic of routing is still
Megatron's. Padding tokens cost no expert work and do not count for the expert bias.

Shapes: t tokens of this rank, k experts a token, E experts, H width.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from msa_train.model.layers.fused_router import best_experts, fused_probs
from msa_train.model.transformer_config import MsaTransformerConfig

# Tokens whose copy in the router's dtype is there at a time: M3's take 192 MiB in fp32.
_CHUNK_TOKENS = 8192
_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class SigmoidRouter(TopKRouter):
    """Route by top-k of sigmoid scores plus a bias that balances the experts without an auxiliary loss."""

    local_tokens_per_expert: Tensor | None
    expert_bias: Tensor | None

    def __init__(
        self,
        config: MsaTransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        # Megatron's constructor would put the buffers of the bias on CUDA; they are made below instead.
        without_bias = copy.copy(config)
        without_bias.moe_router_enable_expert_bias = False
        super().__init__(config=without_bias, pg_collection=pg_collection, **kwargs)
        self.config, self.enable_expert_bias = config, config.moe_router_enable_expert_bias
        # Set by the layer: a recomputed forward must not count its tokens again.
        self.counting = True
        self.topk_choice = self.router_replay = _TopkChoice()
        # fp64 is for tests, and Megatron's versions round it differently there
        self.is_fused = config.is_fused and config.moe_router_dtype == "fp32"
        if self.enable_expert_bias:
            del self.local_tokens_per_expert, self.expert_bias
            zeros = torch.zeros(config.model.num_experts, dtype=torch.float32, device=self.weight.device)
            self.register_buffer("local_tokens_per_expert", zeros.clone(), persistent=False)
            self.register_buffer("expert_bias", zeros)

    def _apply(self, fn: Any, recurse: bool = True) -> "SigmoidRouter":
        """Move with the module, but stay fp32: bf16 counts 1024 tokens as 1025 and flips the bias update."""
        super()._apply(fn, recurse)
        for name in ("local_tokens_per_expert", "expert_bias"):
            buffer = getattr(self, name)
            if buffer is not None and buffer.dtype != torch.float32:
                setattr(self, name, buffer.float())
        return self

    def gating(self, input: Tensor) -> Tensor:
        """Compute router logits in the router dtype: [..., H] -> [..., E]."""
        dtype = _ROUTER_DTYPES.get(self.config.moe_router_dtype or "", input.dtype)
        return _Gating.apply(input, self.weight, dtype)  # type: ignore[return-value]

    def choose(
        self, hidden: Tensor, padding_mask: Tensor | None, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose experts and keep only theirs: hidden [t, 1, H] -> experts [t, k] int32, probs [t, k].

        Args:
            hidden: the tokens.
            padding_mask: [t, 1] bool, True for padding: expert E, probability 0.
            chosen: experts of a forward pass that is made again; None: they are chosen now.
        """
        num_experts = self.config.model.num_experts
        # which expert is replayed where a token has none does not matter, as its probability is 0
        self.topk_choice.replayed = None if chosen is None else chosen.clamp(max=num_experts - 1).long()
        probs, _ = self(hidden, padding_mask)
        experts, self.topk_choice.replayed = self.topk_choice.take(), None
        probs = probs if self.is_fused else probs.gather(1, experts)
        if padding_mask is not None:
            experts = experts.masked_fill(padding_mask.reshape(-1, 1), num_experts)
        return experts.int(), probs

    def _apply_expert_bias(self, *_args: Any, **_kwargs: Any) -> None:
        """Do nothing: Megatron counts here, padding included; `routing` counts instead."""

    def routing(
        self, logits: Tensor, padding_mask: Tensor | None = None, **_unused: Any
    ) -> tuple[Tensor, Tensor]:
        """Choose experts: logits [t, 1, E] -> probs [t, E], routing_map [t, E] bool; fused: see `_fused`.

        padding_mask: [t, 1] bool, True for padding, which goes to no expert.
        """
        if self.is_fused:
            return self._fused(logits.flatten(0, -2), padding_mask)
        probs, routing_map = super().routing(logits)
        if padding_mask is not None:
            real = ~padding_mask.reshape(-1, 1)
            # Probabilities too: the gradient of the router must not see padding.
            probs, routing_map = probs * real, routing_map & real
        if self.local_tokens_per_expert is not None and self.counting and torch.is_grad_enabled():
            self.local_tokens_per_expert += routing_map.sum(0)
        return probs, routing_map

    def _fused(self, logits: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose experts and keep only theirs: logits [t, E] -> probs [t, k], experts [t, k]; E: none."""
        num_experts, choice = logits.shape[1], self.topk_choice
        chosen = choice.replayed
        if chosen is None:
            chosen = best_experts(logits, self.expert_bias, self.topk)
        choice.note(chosen)
        probs = fused_probs(logits, chosen, self.config.moe_router_topk_scaling_factor or 1.0)
        experts = chosen
        if padding_mask is not None:
            is_padding = padding_mask.reshape(-1, 1)
            probs = probs.masked_fill(is_padding, 0)
            experts = chosen.masked_fill(is_padding, num_experts)
        if self.local_tokens_per_expert is not None and self.counting and torch.is_grad_enabled():
            # one more for padding
            counts = self.local_tokens_per_expert.new_zeros(num_experts + 1)
            counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts, dtype=counts.dtype).flatten())
            self.local_tokens_per_expert += counts[:num_experts]
        return probs, experts


class _TopkChoice:
    """Stand in for Megatron's RouterReplay, which keeps one list for the process: tell or set the choice."""

    layer_number: int | None = None

    def __init__(self) -> None:
        self.replayed: Tensor | None = None
        "[t, k] int64 experts to take; None: the best ones"
        self._chosen: Tensor | None = None

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Any
    ) -> tuple[Tensor, Tensor]:
        """Return scores and numbers of the experts, both [t, k]; called by Megatron's routing."""
        chosen = self.replayed
        if chosen is None:
            with torch.no_grad():
                _, chosen = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        self.note(chosen)
        # by the same operation both times: a recomputed layer must save the same tensors
        return scores.gather(1, chosen), chosen

    def note(self, chosen: Tensor) -> None:
        """Remember the experts of a call, [t, k] int64."""
        self._chosen = chosen

    def take(self) -> Tensor:
        """Return the experts of the last call, once."""
        chosen, self._chosen = self._chosen, None
        assert chosen is not None, "the router has just run"
        return chosen


class _Gating(torch.autograd.Function):
    """Multiply in the router's dtype and keep the tokens as they are, not their copy in that dtype."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.dtype = dtype
        wide = weight.to(dtype)
        parts = [F.linear(part.to(dtype), wide) for part in tokens.split(_CHUNK_TOKENS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        tokens, weight = ctx.saved_tensors
        needs_tokens, needs_weight, _ = ctx.needs_input_grad
        grad_tokens = torch.empty_like(tokens) if needs_tokens else None
        grad_weight = weight.new_zeros(weight.shape, dtype=ctx.dtype) if needs_weight else None
        wide = weight.to(ctx.dtype)
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            part = slice(start, start + _CHUNK_TOKENS)
            if grad_tokens is not None:
                grad_tokens[part] = grad[part] @ wide
            if grad_weight is not None:
                rows = tokens[part].to(ctx.dtype).flatten(0, -2)
                grad_weight.addmm_(grad[part].flatten(0, -2).t(), rows)
        return grad_tokens, None if grad_weight is None else grad_weight.to(weight.dtype), None

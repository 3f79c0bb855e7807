"""Route tokens to experts on any device: router, all-to-all dispatcher and layer as Megatron's subclasses.

Megatron's own router and dispatchers place buffers on CUDA and need Transformer Engine's linear; the
arithmetic of routing and permuting is still Megatron's. Padding tokens are routed nowhere: they cost no
expert work and do not count for the expert bias.

Shapes: t tokens of this rank, E experts, L local experts, P ranks of the expert group.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import (
    get_default_pg_collection,
    permute,
    sort_chunks_by_idxs,
    unpermute,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from msa_train.model.transformer_config import MsaTransformerConfig
from msa_train.parallel.comm.fault_watch import watched
from msa_train.parallel.comm.p2p import start_all_to_all_rows

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
        return F.linear(input.to(dtype), self.weight.to(dtype))

    def _apply_expert_bias(self, *_args: Any, **_kwargs: Any) -> None:
        """Do nothing: Megatron counts here, padding included; `routing` counts instead."""

    def routing(
        self, logits: Tensor, padding_mask: Tensor | None = None, **_unused: Any
    ) -> tuple[Tensor, Tensor]:
        """Choose experts: logits [t, 1, E] -> probs [t, E], routing_map [t, E] bool.

        padding_mask: [t, 1] bool, True for padding, which goes to no expert.
        """
        probs, routing_map = super().routing(logits)
        if padding_mask is not None:
            real = ~padding_mask.reshape(-1, 1)
            # Probabilities too: the gradient of the router must not see padding.
            probs, routing_map = probs * real, routing_map & real
        if self.local_tokens_per_expert is not None and self.counting and torch.is_grad_enabled():
            self.local_tokens_per_expert += routing_map.sum(0)
        return probs, routing_map


class AllToAllDispatcher(MoETokenDispatcher):
    """Send every token to the ranks that hold its experts, once per expert, and the outputs back.

    A rank receives about t * moe_router_topk * (P - 1) / P rows of H numbers, and back: at 4,096 tokens a
    rank, 4 experts a token, H = 6,144 in bf16 192 MiB, in up to P - 1 messages.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: MsaTransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        # for messages; 0 until it is known
        self.layer_number = 0

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sort tokens by expert and agree on the counts; one host copy of 2 E numbers.

        Example: 2 ranks with 2 experts each; routing_map.sum(0) [1, 0, 2, 1] sends 1 row to rank 0 and 3 to
        rank 1, sorted by expert.
        """
        self.shape, self.routing_map = hidden_states.shape, routing_map
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        self.token_shape = tokens.shape
        counts = routing_map.sum(0).view(self.ep_size, self.num_local_experts)
        # received[p, l]: tokens that rank p sends to local expert l.
        received = torch.empty_like(counts)
        with watched("expert", self.layer_number):
            dist.all_to_all_single(received, counts, group=self.ep_group)
        # Sizes of messages must be known to launch them: the one time the host waits in this layer.
        on_host = torch.stack((counts, received)).cpu()
        self.received = on_host[1]
        self.send, self.receive = on_host.sum(2).tolist()
        # The number of rows is known on the host, so that `permute` need not wait for the device.
        permuted = permute(tokens, routing_map, probs=probs, num_out_tokens=sum(self.send))
        self.order = permuted[-1] if len(permuted) == 3 else permuted[2]
        assert permuted[1] is not None, "probabilities were given"
        return permuted[0], permuted[1]

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send tokens and their probabilities to the experts' ranks."""
        return (
            _AllToAll.apply(self.ep_group, hidden_states, self.receive, self.send, self.layer_number),
            _AllToAll.apply(self.ep_group, probs, self.receive, self.send, self.layer_number),
        )

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sort rows from rank-major to expert-major order.

        Example: received [[1, 2], [3, 0]] by rank and expert: chunks of 1, 2, 3, 0 rows are taken in the
        order 0, 2, 1, 3, so expert 0 has rows of rank 0, then of rank 1.
        """
        if self._reorders:
            order = torch.arange(self.received.numel()).view(self.received.shape).T.ravel()
            # Every expert multiplies its rows at once, so they must lie together.
            sizes = self.received.ravel()
            hidden_states, sorted_probs = sort_chunks_by_idxs(hidden_states, sizes, order, probs=probs)[:2]
            assert sorted_probs is not None, "probabilities were given"
            probs = sorted_probs
        return hidden_states, self.received.sum(0), probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Sort rows from expert-major back to rank-major order."""
        if self._reorders:
            by_expert = self.received.T
            order = torch.arange(by_expert.numel()).view(by_expert.shape).T.ravel()
            hidden_states = sort_chunks_by_idxs(hidden_states, by_expert.ravel(), order)[0]
        return hidden_states

    def token_combine(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Send expert outputs back to the tokens' ranks."""
        return _AllToAll.apply(self.ep_group, hidden_states, self.send, self.receive, self.layer_number)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum each token's expert outputs, in the original order."""
        out = unpermute(
            hidden_states, self.order, restore_shape=self.token_shape, routing_map=self.routing_map
        )
        return out.view(self.shape)

    @property
    def _reorders(self) -> bool:
        return self.ep_size > 1 and self.num_local_experts > 1


class _AllToAll(torch.autograd.Function):
    """Trade rows unevenly between all ranks; the gradient takes the way back."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, x: Tensor, receive: list[int], send: list[int], layer: int
    ) -> Tensor:
        ctx.arguments = (group, receive, send, layer)
        if group.size() == 1:
            return x.clone()
        out, x = x.new_empty(sum(receive), *x.shape[1:]), x.contiguous()
        with watched("expert", layer):
            for work in start_all_to_all_rows(group, out, x, receive, send):
                work.wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, receive, send, layer = ctx.arguments
        return None, _AllToAll.apply(group, grad, send, receive, layer), None, None, None


class ExpertLayer(MoELayer):
    """Run Megatron's MoE layer with our dispatcher."""

    router: SigmoidRouter

    def __init__(
        self,
        config: MsaTransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, **kwargs)
        self.token_dispatcher = AllToAllDispatcher(self.num_local_experts, config, pg_collection)
        self.token_dispatcher.layer_number = layer_number or 0

    def set_layer_number(self, layer_number: int) -> None:
        """Take the layer number, which Megatron's layers tell after they have built this one."""
        super().set_layer_number(layer_number)
        assert isinstance(self.token_dispatcher, AllToAllDispatcher), "built here"
        self.token_dispatcher.layer_number = layer_number

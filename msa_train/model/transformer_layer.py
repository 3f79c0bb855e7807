"""Run a transformer layer: hands padding to the experts; recomputes and offloads what it is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from msa_train.config import Recompute
from msa_train.model.attention.base import GroupedQueryAttention
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.inputs.pack_params import PackParams, SelectionRecord
from msa_train.model.layers.moe import ExpertLayer
from msa_train.model.layers.moe.feed_forward import FeedForward
from msa_train.model.layers.norm import RMSNorm
from msa_train.model.layers.offload import OffloadedLayer, storage_of
from msa_train.model.layers.recompute import KeptTensors, run_recomputed, run_unit
from msa_train.model.transformer_config import MsaTransformerConfig


class MsaTransformerLayer(TransformerLayer):
    """Run Megatron's layer; its recomputation replays the block selection and routing of the forward pass.

    A selection that is made again could differ in ties, and another one would need other KV blocks.
    """

    config: MsaTransformerConfig

    def __init__(self, config: MsaTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        kind = config.stage_recomputes[self.pg_collection.pp.rank()]
        self.is_recomputed = kind is Recompute.full
        modules = config.recomputed_modules if kind is Recompute.selective else frozenset[str]()
        self._norms = [self.input_layernorm, self.pre_mlp_layernorm] if "norm" in modules else []
        assert isinstance(self.self_attention, GroupedQueryAttention), "of our spec"
        self.self_attention.is_recomputed = "attention" in modules
        self._record = SelectionRecord()
        part = "experts" if isinstance(self.mlp, ExpertLayer) else "ffn"
        # Tiles keep nothing but their input by themselves.
        if part in modules and not config.tile_tokens:
            # Megatron's layer calls it in the middle of its own forward pass.
            self._run_mlp, self.mlp.forward = self.mlp.forward, self._run_mlp_twice  # type: ignore[method-assign]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; Megatron names its input, and backward hooks are put on unnamed ones alone."""
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: PackParams, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Transform hidden_states [T, 1, H] -> (output [T, 1, H], context), as Megatron's layer."""
        # A record of its own for each layer and call: the pack's context is shared by all of them.
        params = replace(packed_seq_params, record=SelectionRecord())
        if not (self.training and torch.is_grad_enabled()):
            return self._run(hidden_states, params, args, kwargs)
        with self._keeping(params):
            if self.is_recomputed:
                return run_recomputed(self._run, hidden_states, params, args, kwargs)
            return self._run(hidden_states, params, args, kwargs)

    @contextmanager
    def _keeping(self, params: PackParams) -> Iterator[None]:
        """Keep what autograd saves as this layer is told to."""
        offload = None
        if self.config.offload_activations:
            # Weights, and what all layers share, are on the device anyway.
            stays = {storage_of(x) for x in (*self.parameters(), *params.context.rotary)}
            offload = OffloadedLayer(params.context.offload, stays, params.context.rotary[0].device)
        if offload is None and not self._norms:
            yield
            return
        with KeptTensors(offload) as kept:
            norms = [norm for norm in self._norms if isinstance(norm, RMSNorm)]
            for norm in norms:
                norm.run = kept.run_norm
            try:
                yield
            finally:
                for norm in norms:
                    norm.run = None

    def _run(
        self, hidden_states: Tensor, params: PackParams, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        params.record.calls += 1
        self._record = params.record
        kwargs = kwargs | {"packed_seq_params": params, "padding_mask": params.context.padding_mask}
        if isinstance(self.mlp, ExpertLayer | FeedForward):
            self.mlp.record = params.record
        router = self.mlp.router if isinstance(self.mlp, ExpertLayer) else None
        if router is None or router.local_tokens_per_expert is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[return-value]
        router.counting = not params.record.replaying
        # The router keeps one sum until its bias is updated; the difference is this call's.
        before = router.local_tokens_per_expert.clone()
        result = super().forward(hidden_states, *args, **kwargs)
        counted = (router.local_tokens_per_expert - before).to(torch.int64)
        if not params.record.replaying:
            LayerStats.add(params.context.stats.tokens_per_expert, self.layer_number, counted)
        return result  # type: ignore[return-value]

    def _run_mlp_twice(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """Run experts or feed-forward network, and again in the backward pass, by the record of this call."""
        if not (self.training and torch.is_grad_enabled()):
            return self._run_mlp(hidden_states, **kwargs)
        record = self._record

        def run(inputs: Tensor) -> Any:
            if isinstance(self.mlp, ExpertLayer):
                self.mlp.router.counting = not record.replaying
                self.mlp.record = record
            return self._run_mlp(inputs, **kwargs)

        return run_unit(run, record, hidden_states)

"""Run a transformer layer: hands the pack's padding to the experts and recomputes itself when asked."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from msa_train.config import Recompute
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.inputs.pack_params import PackParams, SelectionRecord
from msa_train.model.layers.moe import ExpertLayer
from msa_train.model.transformer_config import MsaTransformerConfig


class MsaTransformerLayer(TransformerLayer):
    """Run Megatron's layer; its recomputation replays the block selection of the forward pass.

    A selection that is made again could differ in ties, and another one would need other KV blocks.
    """

    config: MsaTransformerConfig

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: PackParams, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Transform hidden_states [T, 1, H] -> (output [T, 1, H], context), as Megatron's layer."""
        # A record of its own for each layer and call: the pack's context is shared by all of them.
        params = replace(packed_seq_params, record=SelectionRecord())
        if self.config.recompute is Recompute.none or not (self.training and torch.is_grad_enabled()):
            return self._run(hidden_states, params, args, kwargs)
        # Stopping early would skip collectives on ranks that need fewer tensors.
        with set_checkpoint_early_stop(False):
            return checkpoint(  # type: ignore[return-value]
                self._run,
                hidden_states,
                params,
                args,
                kwargs,
                use_reentrant=False,
                # No dropout, so there is no random state to bring back.
                preserve_rng_state=False,
            )

    def _run(
        self, hidden_states: Tensor, params: PackParams, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        params.record.calls += 1
        kwargs = kwargs | {"packed_seq_params": params, "padding_mask": params.context.padding_mask}
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

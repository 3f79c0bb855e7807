"""Run the dense feed-forward layer, tile by tile where train.tile_tokens says so."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from msa_train.model.inputs.pack_params import SelectionRecord
from msa_train.model.layers.moe.gradient_sums import learning
from msa_train.model.layers.moe.tiles import TiledFunction
from msa_train.model.transformer_config import MsaTransformerConfig


class FeedForward(MLP):
    """Run Megatron's MLP; over tiles it keeps its input alone, and its inner width is there for one tile.

    In M3 a token has 24,576 numbers inside against 6,144 outside: 3 GiB for 64K tokens, forward alone.
    """

    config: MsaTransformerConfig
    record: SelectionRecord | None
    "of the next call, set by the transformer layer: whether its output is needed"

    def __init__(
        self,
        config: MsaTransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: Any,
    ) -> None:
        tp_group = None if pg_collection is None else pg_collection.tp
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)
        self.record = None

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute [T, 1, H] -> ([T, 1, H], no bias)."""
        record, self.record = self.record, None
        tile_tokens = self.config.tile_tokens
        if not tile_tokens:
            return super().forward(hidden_states, per_token_scale, **kwargs)
        is_output_needed = record is None or not record.replaying
        out = TiledFunction.run(
            lambda tokens: super(FeedForward, self).forward(tokens)[0],
            learning(self),
            hidden_states,
            tile_tokens,
            is_output_needed=is_output_needed,
        )
        return out, None

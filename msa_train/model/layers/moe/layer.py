"""Run a layer of experts: choose, dispatch, compute, combine, the shared expert under the messages."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from msa_train.config import MoeDispatcher
from msa_train.model.inputs.pack_params import SelectionRecord
from msa_train.model.layers.moe import deepep
from msa_train.model.layers.moe.dispatch import AddUp, Take, TakeSlots, Trade, reorder
from msa_train.model.layers.moe.experts import GroupedExperts
from msa_train.model.layers.moe.router import SigmoidRouter
from msa_train.model.layers.moe.routing import Routing, plan_routing
from msa_train.model.layers.moe.rows import Exchange, TileRows
from msa_train.model.layers.moe.tiles import TiledExperts
from msa_train.model.transformer_config import MsaTransformerConfig


class ExpertLayer(MoELayer):
    """Run Megatron's MoE layer by our own steps; its parts, their names and its checkpoints are Megatron's.

    A rank receives about t * moe_router_topk * (P - 1) / P rows of H numbers, and back: at 4,096 tokens a
    rank, 4 experts a token, H = 6,144 in bf16 192 MiB, in up to P - 1 messages. With tiles the same rows
    travel in as many turns as there are tiles. DeepEP sends them in its own way, see `deepep`.
    """

    config: MsaTransformerConfig
    router: SigmoidRouter
    experts: GroupedExperts
    record: SelectionRecord | None
    "of the next call, set by the transformer layer: where the routing is kept, and whether it is replayed"

    def __init__(
        self,
        config: MsaTransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            config, submodules, layer_number, pg_collection or get_default_pg_collection(), **kwargs
        )
        self.record = None
        self.is_deepep = config.moe_dispatcher is MoeDispatcher.deepep
        if self.is_deepep:
            deepep.check_installed()

    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None, **_unused: Any
    ) -> tuple[Tensor, None]:
        """Compute [T, 1, H] -> ([T, 1, H], no bias).

        padding_mask: [1, T] bool, True for padding, which goes to no expert.
        """
        record, self.record = self.record, None
        mask = None if padding_mask is None else padding_mask.transpose(0, 1)
        replayed: Routing | None = None if record is None else record.routing
        experts, probs = self.router.choose(
            hidden_states, mask, None if replayed is None else replayed.experts
        )
        routing = replayed or plan_routing(
            experts, self.config.model.num_experts, self.ep_group, self.config.tile_tokens, self.number
        )
        if record is not None:
            record.routing = routing
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        if self.config.tile_tokens:
            is_output_needed = record is None or not record.replaying
            out = TiledExperts.run(self, routing, tokens, probs, is_output_needed=is_output_needed)
        elif self.is_deepep:
            out = deepep.compute(self, routing, 0, tokens, probs, self.experts.stacked())
        else:
            out = self._whole(tokens, probs, routing)
        return out.view(hidden_states.shape), None

    def _whole(self, tokens: Tensor, probs: Tensor, routing: Routing) -> Tensor:
        """Compute all tokens at once, recorded by autograd: [T, H], [T, k] -> [T, H]."""
        rows = TileRows(routing, 0)
        tile, exchange = rows.tile, self.exchange
        there = Trade(exchange(), tile.send, tile.receive), Trade(exchange(), tile.send, tile.receive)
        back = Trade(exchange(), tile.receive, tile.send)
        arriving = there[0].start(Take.apply(tokens, rows))  # type: ignore[arg-type]
        scales = there[1].start(TakeSlots.apply(probs, rows))  # type: ignore[arg-type]
        # beside the messages, forward and backward
        shared = None if self.shared is None else self.shared(tokens.unsqueeze(1))
        arriving, scales = there[0].wait(arriving), there[1].wait(scales)
        out = self.experts.compute(
            self.experts.stacked(),
            reorder(arriving, rows.by_expert, rows.by_rank),
            reorder(scales, rows.by_expert, rows.by_rank),
            rows.offsets,
            tile.per_expert,
        )
        combined = back.wait(back.start(reorder(out, rows.by_rank, rows.by_expert)))
        result: Tensor = AddUp.apply(combined, rows)  # type: ignore[assignment]
        return result if shared is None else result + shared.squeeze(1)

    def exchange(self) -> Exchange:
        """Make a trade of rows between the ranks that share the experts."""
        return Exchange(self.ep_group, self.number)

    @property
    def shared(self) -> SharedExpertMLP | None:
        """Return the expert that all tokens go to, on their own rank."""
        shared: Any = self.shared_experts
        return shared

    @property
    def number(self) -> int:
        """Return the layer's number, for messages; 0 until Megatron's layers have told it."""
        return self.layer_number or 0

"""Collect figures that layers leave behind for metrics."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class LayerStats:
    """Hold sums over the packs of a step, by layer number (from 1), on this rank."""

    kl: dict[int, Tensor] = field(default_factory=dict)
    "fp64 scalar, divergences in nats summed over queries and KV heads"
    selected: dict[int, Tensor] = field(default_factory=dict)
    "[num_kv_heads] int64 remote KV blocks selected"
    tokens_per_expert: dict[int, Tensor] = field(default_factory=dict)
    "[num_experts] int64 tokens routed to each expert"
    attention: dict[int, Tensor] = field(default_factory=dict)
    "[num_kv_heads, ...] fp64 `RecallSums.flat` of the sampled queries, in steps that sample some"
    exchange: dict[int, Tensor] = field(default_factory=dict)
    "[2] int64 calls that sent selected KV blocks, and all calls, of layers that exchange blocks"

    @staticmethod
    def add(sums: dict[int, Tensor], layer_number: int, value: Tensor) -> None:
        """Add `value` to the sum of a layer."""
        sums[layer_number] = sums[layer_number] + value if layer_number in sums else value

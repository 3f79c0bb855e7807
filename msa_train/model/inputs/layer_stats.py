"""Figures that a layer leaves behind for metrics."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class LayerStats:
    """Sums over the packs of a step, per layer number (from 1), on this rank.

    kl: fp64 scalar, divergences summed over queries and groups. selected: [M] int64 remote (block, group)
    pairs selected. tokens_per_expert: [num_experts] int64. attention: [M, ...] fp64, `RecallSums.flat` of
    the sampled queries, in steps that sample some. exchange: [2] int64, calls that sent selected pairs, and
    all calls, of layers that exchange blocks.
    """

    kl: dict[int, Tensor] = field(default_factory=dict)
    selected: dict[int, Tensor] = field(default_factory=dict)
    tokens_per_expert: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    exchange: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def add(sums: dict[int, Tensor], layer_number: int, value: Tensor) -> None:
        """sums[layer_number] += value."""
        sums[layer_number] = sums[layer_number] + value if layer_number in sums else value

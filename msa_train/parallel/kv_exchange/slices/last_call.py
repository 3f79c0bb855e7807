"""Choose by a layer's last call what `auto` does in the next one, before its selection is known.

Queries of neighbouring steps select about as many KV blocks. All ranks know the requests of all ranks, so the
loads of the last call are the same everywhere, and so is the choice. A layer's first call chooses when its
requests are there.

Cost: two counts of all requests for each call, a few numbers in the host copy that is made anyway.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_train.config import ExchangeConfig, KvExchange
from msa_train.parallel.comm.link_rates import ExchangeRates
from msa_train.parallel.kv_exchange.cost_model import (
    SELECTED_PAYS,
    KvBlockBytes,
    all_gather_cost,
    selected_cost,
)
from msa_train.parallel.kv_exchange.plan import Demand, ExchangeShape, count_bits, find_loads


@dataclass(slots=True, frozen=True)
class Choices:
    """Hold the shapes of exchanges that `auto` chooses between beside an all-gather."""

    flat: ExchangeShape
    "every rank sends to every other one"
    nodes: ExchangeShape | None
    "over the network once per node; None where the ranks know of no nodes"

    @property
    def shapes(self) -> list[ExchangeShape]:
        """List them."""
        return [self.flat] if self.nodes is None else [self.flat, self.nodes]

    def loads(self, bits: Tensor, hot: Tensor) -> Tensor:
        """Count broadcast blocks, then for each shape and hop the rows of the busiest rank: int64.

        Args:
            bits: [P, P, W] uint8 requests, broadcast blocks left out.
            hot: [P, NP] bool broadcast blocks.
        """
        counts = count_bits(bits)
        numbers = [hot.sum()]
        for shape in self.shapes:
            loads = find_loads(Demand(shape, bits, counts, hot, counts.sum(1)))
            pairs = zip(loads.send, loads.receive, strict=True)
            numbers += [torch.maximum(send, receive).max() for send, receive in pairs]
        return torch.stack(numbers)


@dataclass(slots=True, frozen=True)
class LastCall:
    """Hold the loads of a layer's last call."""

    num_hot: int
    "broadcast blocks"
    busiest: list[list[int]]
    "by shape of `Choices.shapes` and hop, rows of the busiest rank"

    @staticmethod
    def read(numbers: list[int], choices: Choices) -> "LastCall":
        """Read what `Choices.loads` counted."""
        busiest, place = [], 1
        for shape in choices.shapes:
            hops = 2 if shape.hierarchical else 1
            busiest.append(numbers[place : place + hops])
            place += hops
        return LastCall(numbers[0], busiest)

    def choose(
        self,
        choices: Choices,
        size: KvBlockBytes,
        rates: ExchangeRates,
        settings: ExchangeConfig,
    ) -> tuple[KvExchange, ExchangeShape]:
        """Choose selected KV blocks in one of the shapes, or an all-gather that starts before the scoring.

        Args:
            choices: shapes.
            size: of a KV block.
            rates: measured.
            settings: of the exchange.
        """
        fetches = 1 if settings.keep_for_backward or not size.backward else 2
        costs = [
            selected_cost(shape, busiest, self.num_hot, size, rates, fetches=fetches)
            for shape, busiest in zip(choices.shapes, self.busiest, strict=True)
        ]
        best = min(range(len(costs)), key=lambda number: costs[number])
        gathered = all_gather_cost(choices.flat, size, rates)
        kind = KvExchange.selected if costs[best] <= SELECTED_PAYS * gathered else KvExchange.all_gather
        return kind, choices.shapes[best]

"""Turn the tokens of a tile into rows for experts, and back; send rows between ranks.

Rows leave in the order of their experts, so also of their ranks; within an expert, of their tokens. Arriving
rows lie by rank, and are sorted by local expert. All is done by reading at indices, never by adding at them:
nothing depends on the order in which threads finish, and nothing waits for the device.

Shapes: t tokens of a tile, k experts a token, N rows that leave, R rows that arrive, H width.

Cost of a tile of 2,048 tokens at k = 4, H = 6,144 in bf16, by arithmetic: N = 8,192 rows are 96 MiB, in up to
P - 1 messages. R is N where the experts are balanced, at most 1.5 N where they are not: `routing` then makes
smaller tiles.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from msa_train.model.layers.moe.routing import Routing
from msa_train.parallel.comm.fault_watch import watched
from msa_train.parallel.comm.p2p import start_all_to_all_rows


class SlotRows:
    """Know the rows of tokens that each have k slots: one for each slot with an expert, sorted by expert."""

    def __init__(self, experts: Tensor, num_rows: int) -> None:
        """Sort slots by expert.

        Args:
            experts: [t, k] number of each slot's expert; slots without one have a number above all others.
            num_rows: N, slots with an expert.
        """
        self.num_tokens, self.topk = experts.shape
        order, place = _sort(experts.flatten())
        self.num_rows = num_rows
        # Places without an expert were sorted to the end.
        self.slot_of_row = order[:num_rows]
        self.token_of_row = self.slot_of_row // self.topk
        self.is_real = place < num_rows
        self.row_of_slot = place.clamp_(max=max(num_rows - 1, 0))

    def take(self, tokens: Tensor) -> Tensor:
        """Copy each token once for each of its experts: [t, H] -> [N, H]."""
        return tokens.index_select(0, self.token_of_row)

    def add_up(self, rows: Tensor) -> Tensor:
        """Sum the rows of each token, at once in fp32 or more: [N, H] -> [t, H]. Transpose of `take`."""
        if self.num_rows == 0:
            return rows.new_zeros(self.num_tokens, *rows.shape[1:])
        weights = self.is_real.to(rows.dtype).view(-1, self.topk)
        places = self.row_of_slot.view(-1, self.topk)
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights)

    def take_slots(self, values: Tensor) -> Tensor:
        """Pick a number for each row: [t, k] -> [N]."""
        return values.flatten().index_select(0, self.slot_of_row)

    def fill_slots(self, values: Tensor) -> Tensor:
        """Bring numbers back to their tokens: [N] -> [t, k], 0 where there is no expert."""
        if self.num_rows == 0:
            return values.new_zeros(self.num_tokens, self.topk)
        filled = values.index_select(0, self.row_of_slot).masked_fill_(~self.is_real, 0)
        return filled.view(self.num_tokens, self.topk)


class TileRows(SlotRows):
    """Know the rows of one tile: made from a Routing on the device, as often as they are needed."""

    def __init__(self, routing: Routing, number: int) -> None:
        """Sort the tile's tokens by expert.

        Args:
            routing: of the layer's call.
            number: of the tile.
        """
        self.tile = tile = routing.tiles[number]
        super().__init__(routing.experts[tile.start : tile.stop], sum(tile.send))
        received = tile_counts(routing, number)
        self.by_expert, self.by_rank = self._order_of_arrivals(received)
        "[R] where each row of the one order lies in the other; None: both are the same"
        self.offsets = expert_offsets(received)

    def _order_of_arrivals(self, received: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Order rows by local expert that arrive by rank: received [P, L] -> two times [R].

        Example: received [[1, 2], [3, 0]] -> by_expert [0, 3, 4, 5, 1, 2], by_rank [0, 4, 5, 1, 2, 3].
        """
        num_ranks, num_local = received.shape
        if num_ranks == 1 or num_local == 1:
            return None, None
        # the chunk of each row, of which there are P L, one for each expert within one for each rank
        rows = torch.arange(sum(self.tile.receive), device=received.device)
        chunk = torch.searchsorted(received.flatten().cumsum(0), rows, right=True)
        return _sort(chunk % num_local)


def tile_counts(routing: Routing, number: int) -> Tensor:
    """Return the rows of a tile that arrive, by rank and local expert: [P, L] int32."""
    return routing.received[slice(*routing.tiles[number].granules)].sum(0)


def expert_offsets(received: Tensor) -> Tensor:
    """Return the row after the last one of each local expert: [P, L] -> [L] int32."""
    return received.sum(0).cumsum(0).to(torch.int32)


def _sort(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sort stably: [n] -> (index of the i-th smallest, place of each key), both [n] int64."""
    order = torch.sort(keys, stable=True).indices
    places = torch.arange(len(keys), device=keys.device)
    return order, torch.empty_like(order).scatter_(0, order, places)


def reordered(rows: Tensor, order: Tensor | None) -> Tensor:
    """Take rows in another order; None: as they are."""
    return rows if order is None else rows.index_select(0, order)


@dataclass(slots=True)
class Exchange:
    """Trade rows between the ranks of a group, beside whatever is computed until `wait`."""

    group: dist.ProcessGroup
    "ranks that share the experts"
    layer: int
    "its number, for messages"
    out: Tensor | None = None
    "rows that arrive"
    _sent: Tensor | None = None
    "rows that leave, kept while they travel"
    _works: list[Any] | None = None
    "what is under way"

    def start(self, rows: Tensor, send: list[int], receive: list[int]) -> "Exchange":
        """Begin to trade: rows [sum(send), ...] leave, sum(receive) rows will arrive."""
        if self.group.size() == 1:
            self.out = rows
            return self
        self._sent = rows.contiguous()
        self.out = rows.new_empty(sum(receive), *rows.shape[1:])
        with watched("expert", self.layer):
            self._works = start_all_to_all_rows(self.group, self.out, self._sent, receive, send)
        return self

    def wait(self) -> Tensor:
        """Return the rows that arrived, and keep nothing."""
        if self._works:
            with watched("expert", self.layer):
                for work in self._works:
                    work.wait()
        out, self.out, self._sent, self._works = self.out, None, None, None
        assert out is not None, "started, and waited for once"
        return out

"""Count the bytes of `selected` by rank where hot pairs are broadcast and nodes are known.

Counted from the sets of pairs that every rank wants, not with the planner that the exchange uses: so an
error of the planner shows as a difference.
Shapes: P ranks, NP pairs of each owner, L ranks of a node, N nodes; rank = node * L + place. Pairs that a
given share of the other ranks (at least 3) wants are hot, if broadcasting them spares the busiest rank.

- flat: a rank fetches its pairs from their owners, and gets back the gradients of what it served;
- nodes: a pair crosses the network once per node, to the rank in its owner's place, and goes on inside the
  node; gradients go the same way back, summed where they meet;
- hot pairs of all owners: cut in P slices. A rank gets its slice from the owners and gathers the P - 1
  others; backward it gets P - 1 parts of its slice (with nodes L - 1 of a place's, then N - 1), and owners
  get their sums.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.exchange.formulas import LayerShape, index_key_bytes, request_bytes

# as the planner of the exchange has it
_MIN_REQUESTERS = 3


@dataclass(slots=True, frozen=True)
class Wants:
    """Hold what all ranks want, and what the exchange may do about it."""

    wanted: Tensor
    "[P, P, NP] bool, by requester and owner; a rank's own pairs are False"
    ranks_per_node: int = 0
    "L; 0: the exchange knows of no nodes"
    hot_share: float = 0.0
    "share of the other ranks from which on a pair is hot; 0: no hot pairs"

    @property
    def size(self) -> int:
        """Return P, the number of ranks."""
        return self.wanted.shape[0]

    @property
    def hot(self) -> Tensor:
        """Find the hot pairs, [P, NP] bool by owner: none where broadcasting them costs more than it spares.

        H hot pairs cost each rank H / P for its slice and H for gathering all of them: H (1 + 1 / P).
        Example: 4 ranks, 2 pairs that all others want: 2 * 1.25 = 2.5 pairs, against 6 that an owner sends.
        """
        requesters = max(_MIN_REQUESTERS, math.ceil(self.hot_share * (self.size - 1)))
        asked = (self.wanted.sum(0) >= requesters) & (self.hot_share > 0)
        broadcast = int(asked.sum()) * (1 + 1 / self.size)
        pays = self._busiest(self.wanted & ~asked) + broadcast < self._busiest(self.wanted)
        return asked & pays

    def _busiest(self, wanted: Tensor) -> int:
        """Count the most pairs that a rank sends or receives; with nodes: over the network."""
        if L := self.ranks_per_node:
            N = self.size // L
            # [requesting node, owner's node, owner's place, NP], its own node's left out.
            crosses = wanted.view(N, L, N, L, -1).any(1)
            crosses = crosses & ~torch.eye(N, dtype=torch.bool)[:, :, None, None]
            # Those of a place come to the rank in that place.
            return max(int(crosses.sum((0, 3)).max()), int(crosses.sum((1, 3)).max()))
        return max(int(wanted.sum((0, 2)).max()), int(wanted.sum((1, 2)).max()))


def demand_bytes(shape: LayerShape, wants: Wants) -> list[dict[str, int]]:
    """Count the bytes that every rank receives, by part of the exchange.

    Args:
        shape: of the layer; kept for the backward pass.
        wants: what all ranks want.
    """
    kv, grad = shape.kv_block_bytes(shape.kv_token_bytes), shape.kv_block_bytes(shape.grad_token_bytes)
    rows = _by_node(wants) if wants.ranks_per_node else _flat(wants)
    forward, backward = _hot_forward(wants, kv), _hot_backward(wants, grad)
    shared = {
        "index_key": index_key_bytes(shape, wants.size),
        "request": request_bytes(shape, wants.size),
    }
    return [
        {**shared, "kv": fetched * kv + hot, "kv_grad": returned * grad + hot_back}
        for (fetched, returned), hot, hot_back in zip(rows, forward, backward, strict=True)
    ]


def _flat(wants: Wants) -> list[tuple[int, int]]:
    """Count the pairs that each rank fetches, and those whose gradients it gets back."""
    counts = (wants.wanted & ~wants.hot).sum(2)
    return list(zip(counts.sum(1).tolist(), counts.sum(0).tolist(), strict=True))


def _by_node(wants: Wants) -> list[tuple[int, int]]:
    """Count the same over both hops; what is handed on counts where it arrives."""
    L, P = wants.ranks_per_node, wants.size
    cold = (wants.wanted & ~wants.hot).view(P // L, L, P // L, L, -1)
    crosses = cold.any(1)
    rows: list[tuple[int, int]] = []
    for node in range(P // L):
        for place in range(L):
            others = [n for n in range(P // L) if n != node]
            mates = [p for p in range(L) if p != place]
            fetched = crosses[node, others, place].sum() + cold[node, place, :, mates].sum()
            returned = crosses[others, node, place].sum() + cold[node, mates, :, place].sum()
            rows.append((int(fetched), int(returned)))
    return rows


def _hot_forward(wants: Wants, kv_block_bytes: int) -> list[int]:
    """Count the bytes of hot pairs that each rank receives: its slice from the owners, then the others."""
    slices, ranks = _Slices.of(wants, kv_block_bytes), range(wants.size)
    others = (wants.size - 1) * slices.size
    return [others + sum(slices.overlap(o, rank) for o in ranks if o != rank) for rank in ranks]


def _hot_backward(wants: Wants, kv_block_bytes: int) -> list[int]:
    """Count the bytes of their gradients: parts of its slice to be summed, then sums of its own pairs."""
    slices, ranks = _Slices.of(wants, kv_block_bytes), range(wants.size)
    L, N = slices.ranks_per_node, wants.size // slices.ranks_per_node
    parts = ((L - 1) * N + N - 1) * slices.size
    return [parts + sum(slices.overlap(rank, o) for o in ranks if o != rank) for rank in ranks]


@dataclass(slots=True, frozen=True)
class _Slices:
    """Cut all hot pairs, one after the other, in equal slices."""

    ends: list[int]
    "byte at which each owner's pairs begin, and the end of all; P + 1 numbers"
    size: int
    "bytes of a slice, a multiple of 4"
    ranks_per_node: int
    "L; P where the exchange knows of no nodes"

    @staticmethod
    def of(wants: Wants, kv_block_bytes: int) -> "_Slices":
        ends = [0, *(wants.hot.sum(1).cumsum(0) * kv_block_bytes).tolist()]
        # Whole elements of 4 bytes.
        size = -(-ends[-1] // 4 // wants.size) * 4
        return _Slices(ends, size, wants.ranks_per_node or wants.size)

    def overlap(self, owner: int, rank: int) -> int:
        """Count the bytes of the owner's pairs in the rank's slice; slices of a place are neighbours.

        Example: 2 nodes of 2 ranks: slices lie in the order of ranks 0, 2, 1, 3.
        """
        L, N = self.ranks_per_node, (len(self.ends) - 1) // self.ranks_per_node
        first = (rank % L * N + rank // L) * self.size
        return max(0, min(self.ends[owner + 1], first + self.size) - max(self.ends[owner], first))

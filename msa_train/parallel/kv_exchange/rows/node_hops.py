"""Make the index lists of an exchange by nodes: over the network once per node, then on inside it.

Where queries select in slices, a KV block that an earlier slice has brought to a node does not cross the
network again: it waits there among the rows in transit (`Earlier`).

Shapes: as in `plan`: P ranks, N nodes of L ranks, NP KV blocks of a rank, W bytes of a bitmap.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_train.parallel.kv_exchange.rows.bitmaps import nonzero_of, unpack_bits


@dataclass(slots=True)
class Hop:
    """Describe one uneven all-to-all of a rank. Gradients take it backwards."""

    take: Tensor
    "[sum(send)] int64 rows of the source, by receiving rank"
    send: list[int]
    "rows to each rank of the hop's group"
    receive: list[int]
    "rows from each rank of the hop's group"


@dataclass(slots=True)
class Earlier:
    """Hold what earlier slices of the same layer call have brought across the network."""

    crossed: Tensor
    "[N, P, W] uint8 by node, KV blocks that are there; the same on all ranks"
    row: Tensor
    "[N, NP] int64, this rank's source row of each KV block of the owners in its place; wrong where absent"
    num_rows: int
    "own rows and rows in transit so far"


class NodeView:
    """Hold the demand as one rank (node, place) of a hierarchical exchange sees it.

    asked_by_node: [N, NP] bool, own KV blocks that some rank of each other node wants and that node lacks.
    mates: [L, N, NP] bool, what each rank of the own node wants from the owners in this place of all nodes.
    transit: [N, NP] bool, KV blocks of other nodes' owners in this place that some rank of this node wants
    and that are not here yet.
    """

    def __init__(
        self, bits: Tensor, rank: int, node_size: int, num_kv_blocks: int, earlier: Earlier | None = None
    ) -> None:
        L, N, NP = node_size, bits.shape[0] // node_size, num_kv_blocks
        self.node, self.place, self.sizes = rank // L, rank % L, (N, L, NP)
        self.own, self.earlier = bits[rank], earlier
        self.asked_by_node = unpack_bits(bits[:, rank], NP).view(N, L, NP).any(1)
        self.mates = unpack_bits(bits[self.node * L : (self.node + 1) * L, self.place :: L], NP)
        self.transit = self.mates.any(0)
        if earlier is not None:
            self.asked_by_node &= ~unpack_bits(earlier.crossed[:, rank], NP)
            self.transit &= ~unpack_bits(earlier.crossed[self.node, self.place :: L], NP)
        self.asked_by_node[self.node] = False
        self.transit[self.node] = False

    def rows(self) -> Tensor:
        """Number the source rows: [N, NP] int64, own KV blocks first, then rows in transit as they came."""
        N, _, NP = self.sizes
        first = NP if self.earlier is None else self.earlier.num_rows
        row = first - 1 + self.transit.flatten().cumsum(0).view(N, NP)
        if self.earlier is not None:
            row = torch.where(self.transit, row, self.earlier.row)
        row[self.node] = torch.arange(NP, device=row.device)
        return row


def hierarchical_hops(view: NodeView, counts: list[int]) -> tuple[list[Hop], Tensor, Tensor]:
    """Make both hops, and owner and KV block of what arrives ([R] int64 each).

    Two hops, since several ranks of a node often want the same KV block: it crosses the network once, to the
    rank in the owner's place, which hands it on over the node's fast links. Rows go to a rank of the node by
    owner's node, the own node first: they stand in the source in this order.

    Example: 4 ranks on nodes of 2, 2 KV blocks each. Rank 0 wants block 1 of rank 1 and 0 of rank 2; rank 1
    wants 0 of rank 0 and both of rank 2; rank 3 wants 0 of rank 0. Plan of rank 0: asked_by_node [[0, 0],
    [1, 0]], transit [[0, 0], [1, 1]]. Outer (ranks 0, 2): take [0], send [0, 1]; receive [0, 2], both blocks
    of rank 2, each once: the source is then own 0, own 1, transit 0, transit 1. Inner (ranks 0, 1):
    take [2, 0, 2, 3], send [1, 3] (transit 0 to itself; own 0, transit 0 and 1 to rank 1), receive [1, 1];
    owner [2, 1], KV block [0, 1].
    """
    N, L, NP = view.sizes
    outer_send, outer_receive = counts[:N], counts[N : 2 * N]
    inner_send, inner_receive = counts[2 * N : 2 * N + L], counts[2 * N + L : 2 * N + 2 * L]
    n = torch.arange(N, device=view.own.device)
    # The own node, then the others ascending.
    nodes = torch.where(n == 0, view.node, n - (n <= view.node).long())
    asked = nonzero_of(view.mates[:, nodes], sum(inner_send)) % (N * NP)
    own = unpack_bits(view.own, NP).view(N, L, NP).transpose(0, 1)
    arriving = nonzero_of(own[:, nodes], sum(inner_receive))
    place, node = arriving // (N * NP), nodes[arriving // NP % N]
    hops = [
        Hop(nonzero_of(view.asked_by_node, sum(outer_send)) % NP, outer_send, outer_receive),
        Hop(view.rows()[nodes].flatten()[asked], inner_send, inner_receive),
    ]
    return hops, node * L + place, arriving % NP

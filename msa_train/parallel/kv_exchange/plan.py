"""Who sends which (block, group) pairs to whom, given what every rank wants. No process group needed.

Every rank learns the wants of all ranks: each contributes a bitmap with one bit per pair of every owner, and
all bitmaps are gathered. That costs P * M * NB / 8 bytes per rank and layer: 12 KB for 192K tokens on 16
ranks, 41 MB for 10M tokens on 1,024 ranks (block 128, M = 4), where the index keys that travel anyway are 2.6
GB. In return one message serves everything: the same choice of scheme on all ranks, the union over a node's
ranks, the pairs that nearly all want, and the same verdict everywhere on a request that does not fit. Bitmaps
sent to the owner alone (an all-to-all, 41 KB) would need a second message for each of these.

Schemes: *flat*, an owner sends to each rank that asks; *hierarchical*, over the network to one rank per node
and from there to the node's others. *Hot* pairs, wanted by nearly all ranks, are cut in P slices that all
ranks gather, so that their owners send them once.

Shapes: P ranks, M KV groups, NL blocks per rank, NP = M * NL pairs of a rank, numbered group * NL + local
block, W = ceil(NP / 8) bytes of a bitmap, L ranks of a node, N = P / L nodes; rank = node * L + place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this number of requesters a broadcast has nothing to win.
_MIN_HOT_REQUESTERS = 3
# Weight of the broadcast in the decision for it; tests lower it to have one in any case.
HOT_COST = 1.0


@dataclass(slots=True, frozen=True)
class ExchangeShape:
    """What all ranks know before any request.

    ranks_per_node: L, 0 or all ranks for a flat exchange. hot_share: share of the other ranks that make a
    pair hot when they want it, 0 for none.
    """

    cp_size: int
    num_groups: int
    num_local_blocks: int
    ranks_per_node: int = 0
    hot_share: float = 0.0

    @property
    def num_kv_blocks(self) -> int:
        """Pairs of each rank."""
        return self.num_groups * self.num_local_blocks

    @property
    def num_bytes(self) -> int:
        """Bytes of the bitmap of one owner's pairs."""
        return -(-self.num_kv_blocks // 8)

    @property
    def hierarchical(self) -> bool:
        """Whether there are nodes of several ranks, and several nodes."""
        return 1 < self.ranks_per_node < self.cp_size

    @property
    def node_size(self) -> int:
        """Ranks of a node; all of them in a flat exchange."""
        return self.ranks_per_node if self.hierarchical else self.cp_size

    @property
    def num_nodes(self) -> int:
        """Nodes; one in a flat exchange."""
        return self.cp_size // self.node_size

    @property
    def hot_requesters(self) -> int:
        """Ranks that must want a pair for it to be hot; more than there are where none can be."""
        if not 0 < self.hot_share <= 1:
            return self.cp_size
        share = self.hot_share * (self.cp_size - 1)
        return max(_MIN_HOT_REQUESTERS, int(share) + (share > int(share)))


def pack_bits(wanted: Tensor) -> Tensor:
    """[..., NP] bool -> [..., W] uint8, the first pair in the lowest bit.

    Example: [True, False, True, False, False, False, False, False, True] -> [5, 1].
    """
    padded = torch.nn.functional.pad(wanted, (0, -wanted.shape[-1] % 8))
    # Made on the device: a tensor from a list would make the host wait for it.
    shifts = torch.arange(8, dtype=torch.uint8, device=wanted.device)
    weights = torch.ones_like(shifts) << shifts
    return (padded.view(*wanted.shape[:-1], -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, num_kv_blocks: int) -> Tensor:
    """Inverse of `pack_bits`: [..., W] uint8 -> [..., NP] bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).bool().flatten(-2)[..., :num_kv_blocks]


def nonzero_of(mask: Tensor, count: int) -> Tensor:
    """Ascending flat positions of the `count` true entries: no copy to the host where the count is known.

    Example: [[False, True], [True, False]], 2 -> [1, 2].
    """
    flat = mask.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, count)
    # One place more than there are: what is false writes there.
    found = torch.empty(count + 1, dtype=torch.int64, device=mask.device)
    return found.scatter_(0, place, torch.arange(flat.numel(), device=mask.device))[:count]


@dataclass(slots=True)
class Demand:
    """What all ranks want.

    bits: [P, P, W] uint8, by requester and owner, hot pairs left out; counts: [P, P] int64 pairs of them.
    hot: [P, NP] bool, by owner. wanted: [P] int64, pairs that each rank wants, hot ones included.
    """

    shape: ExchangeShape
    bits: Tensor
    counts: Tensor
    hot: Tensor
    wanted: Tensor


def find_demand(bits: Tensor, shape: ExchangeShape) -> Demand:
    """Separate hot pairs from the others where that spares the busiest rank.

    A broadcast brings every rank all H hot pairs in two steps, H / P and H pairs. So it pays where an owner
    sends much more than ranks receive, and is left out where what they receive is the bound anyway.

    Args:
        bits: [P, P, W] uint8, all requests by requester and owner.
        shape: of the exchange.
    """
    counts = count_bits(bits)
    wanted = counts.sum(1)
    if shape.hot_requesters >= shape.cp_size:
        none = torch.zeros(shape.cp_size, shape.num_kv_blocks, dtype=torch.bool, device=bits.device)
        return Demand(shape, bits, counts, none, wanted)
    plain = Demand(shape, bits, counts, popularity(bits, shape) >= shape.hot_requesters, wanted)
    others = bits & ~pack_bits(plain.hot)
    split = Demand(shape, others, count_bits(others), plain.hot, wanted)
    # Decided where the numbers are, so that the host need not wait for them.
    broadcast = split.hot.sum() * (HOT_COST * (1 + 1 / shape.cp_size))
    pays = _busiest_rows(split) + broadcast < _busiest_rows(plain)
    return Demand(
        shape,
        torch.where(pays, split.bits, plain.bits),
        torch.where(pays, split.counts, plain.counts),
        plain.hot & pays,
        wanted,
    )


def _busiest_rows(demand: Demand) -> Tensor:
    """Most pairs that a rank sends or receives, hot ones apart; with nodes: over the network."""
    loads = find_loads(demand)
    return torch.maximum(loads.send[0].max(), loads.receive[0].max())


def popularity(bits: Tensor, shape: ExchangeShape) -> Tensor:
    """Ranks that want each pair: [P, P, W] uint8 -> [P, NP] int32, by owner."""
    planes = [((bits >> bit) & 1).sum(0, dtype=torch.int32) for bit in range(8)]
    return torch.stack(planes, dim=-1).flatten(-2)[:, : shape.num_kv_blocks]


def count_bits(bits: Tensor) -> Tensor:
    """Set bits of each bitmap: [..., W] uint8 -> [...] int64.

    Example: [[5, 1], [0, 255]] -> [3, 8].
    """
    # Sums of neighbouring bits, then of pairs of bits, then of both halves of a byte.
    x = bits - ((bits >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).sum(-1, dtype=torch.int64)


@dataclass(slots=True)
class Loads:
    """Pairs that every rank sends and receives, [P] int64 each, by hop (flat: one; hierarchical: outer,
    inner).

    hot: scalar int64, hot pairs of all owners.
    """

    send: list[Tensor]
    receive: list[Tensor]
    hot: Tensor


def find_loads(demand: Demand) -> Loads:
    """Loads of all ranks: for the cost of a scheme, and for simulation."""
    shape, bits = demand.shape, demand.bits
    hot = demand.hot.sum()
    if not shape.hierarchical:
        return Loads([demand.counts.sum(0)], [demand.counts.sum(1)], hot)
    L, N = shape.node_size, shape.num_nodes
    by_node = bits.view(N, L, shape.cp_size, -1)
    union = by_node[:, 0]
    for place in range(1, L):
        union = union | by_node[:, place]
    # [requesting node, owner's node, owner's place]
    crossing = count_bits(union).view(N, N, L)
    own_node = torch.arange(N, device=bits.device)
    crossing[own_node, own_node] = 0
    # [requesting node, requester's place, owner's place]: what the rank in the owner's place hands on
    handed = demand.counts.view(N, L, N, L).sum(2)
    # Pairs that a rank fetched from another node for itself do not travel again.
    for place in range(L):
        handed[:, place, place] = 0
    return Loads(
        [crossing.sum(0).flatten(), handed.sum(1).flatten()],
        [crossing.sum(1).flatten(), handed.sum(2).flatten()],
        hot,
    )


@dataclass(slots=True)
class Hop:
    """One uneven all-to-all of a rank.

    take: [sum(send)] int64 rows of the source, by receiving rank. send, receive: rows to and from each rank.
    """

    take: Tensor
    send: list[int]
    receive: list[int]


@dataclass(slots=True)
class RankPlan:
    """One rank's part of an exchange.

    hops: flat: over all ranks, from own pairs to fetched rows. Hierarchical: over the ranks in the same place
        of all nodes, from own pairs to rows in transit; then over the node's ranks, from own pairs followed
        by rows in transit to fetched rows.
    group, block_of_owner, owner: [R] int64 each, KV group, local block and owner of every fetched row, in
    order
        of arrival.
    hot_rows: hot pairs of each owner. hot_pairs: [hot_rows[rank]] own ones. hot_group, hot_block_of_owner,
        hot_owner: [sum(hot_rows)] of all, by owner.
    """

    hops: list[Hop]
    group: Tensor
    block_of_owner: Tensor
    owner: Tensor
    hot_rows: list[int]
    hot_pairs: Tensor
    hot_group: Tensor
    hot_block_of_owner: Tensor
    hot_owner: Tensor

    @property
    def num_rows(self) -> int:
        """Fetched rows, hot ones left out."""
        return self.owner.shape[0]

    @property
    def num_hot(self) -> int:
        """Hot pairs of all owners."""
        return sum(self.hot_rows)


def count_rows(demand: Demand, rank: int) -> Tensor:
    """Sizes that the host needs for `plan_rank`, in its order: [3 P] int64, hierarchical [2 N + 2 L + P]."""
    shape, hot = demand.shape, demand.hot.sum(1)
    if not shape.hierarchical:
        return torch.cat((demand.counts[:, rank], demand.counts[rank], hot))
    view = _NodeView(demand, rank)
    outer_send, outer_receive = view.asked_by_node.sum(1), view.transit.sum(1)
    inner_send = view.mates.sum((1, 2))
    inner_receive = demand.counts[rank].view(shape.num_nodes, shape.node_size).sum(0)
    return torch.cat((outer_send, outer_receive, inner_send, inner_receive, hot))


def plan_rank(demand: Demand, rank: int, counts: list[int]) -> RankPlan:
    """Index lists of one rank.

    Args:
        demand: the same on all ranks.
        rank: whose plan.
        counts: of `count_rows`, on the host.
    """
    shape, P, NP = demand.shape, demand.shape.cp_size, demand.shape.num_kv_blocks
    hot_rows = counts[-P:]
    if shape.hierarchical:
        hops, owner, pair = _hierarchical_hops(demand, rank, counts)
    else:
        send, receive = counts[:P], counts[P : 2 * P]
        take = nonzero_of(unpack_bits(demand.bits[:, rank], NP), sum(send)) % NP
        arriving = nonzero_of(unpack_bits(demand.bits[rank], NP), sum(receive))
        hops, owner, pair = [Hop(take, send, receive)], arriving // NP, arriving % NP
    all_hot = nonzero_of(demand.hot, sum(hot_rows))
    first = sum(hot_rows[:rank])
    return RankPlan(
        hops=hops,
        group=pair // shape.num_local_blocks,
        block_of_owner=pair % shape.num_local_blocks,
        owner=owner,
        hot_rows=hot_rows,
        hot_pairs=all_hot[first : first + hot_rows[rank]] % NP,
        hot_group=all_hot % NP // shape.num_local_blocks,
        hot_block_of_owner=all_hot % NP % shape.num_local_blocks,
        hot_owner=all_hot // NP,
    )


class _NodeView:
    """Demand as one rank (node, place) of a hierarchical exchange sees it.

    asked_by_node: [N, NP] bool, own pairs that some rank of each other node wants.
    mates: [L, N, NP] bool, what each rank of the own node wants from the owners in this place of all nodes.
    transit: [N, NP] bool, pairs of other nodes' owners in this place that some rank of the own node wants.
    """

    def __init__(self, demand: Demand, rank: int) -> None:
        shape, NP = demand.shape, demand.shape.num_kv_blocks
        L, N = shape.node_size, shape.num_nodes
        self.node, place = rank // L, rank % L
        self.asked_by_node = unpack_bits(demand.bits[:, rank], NP).view(N, L, NP).any(1)
        self.asked_by_node[self.node] = False
        self.mates = unpack_bits(demand.bits[self.node * L : (self.node + 1) * L, place::L], NP)
        self.transit = self.mates.any(0)
        self.transit[self.node] = False


def _hierarchical_hops(demand: Demand, rank: int, counts: list[int]) -> tuple[list[Hop], Tensor, Tensor]:
    """Both hops, and owner and pair of what arrives.

    Rows go to a rank of the node by owner's node, the own node first: they stand in the source in this order.
    """
    shape, NP = demand.shape, demand.shape.num_kv_blocks
    L, N, view = shape.node_size, shape.num_nodes, _NodeView(demand, rank)
    outer_send, outer_receive = counts[:N], counts[N : 2 * N]
    inner_send, inner_receive = counts[2 * N : 2 * N + L], counts[2 * N + L : 2 * N + 2 * L]
    device = demand.bits.device
    n = torch.arange(N, device=device)
    # The own node, then the others ascending.
    nodes = torch.where(n == 0, view.node, n - (n <= view.node).long())
    # Row of the source where each pair stands: own pairs, then rows in transit.
    row = NP - 1 + view.transit.flatten().cumsum(0).view(N, NP)
    row[view.node] = torch.arange(NP, device=device)
    asked = nonzero_of(view.mates[:, nodes], sum(inner_send)) % (N * NP)
    own = unpack_bits(demand.bits[rank], NP).view(N, L, NP).transpose(0, 1)
    arriving = nonzero_of(own[:, nodes], sum(inner_receive))
    place, node = arriving // (N * NP), nodes[arriving // NP % N]
    hops = [
        Hop(nonzero_of(view.asked_by_node, sum(outer_send)) % NP, outer_send, outer_receive),
        Hop(row[nodes].flatten()[asked], inner_send, inner_receive),
    ]
    return hops, node * L + place, arriving % NP

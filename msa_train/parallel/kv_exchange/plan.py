"""Plan who sends which KV blocks to whom, given what every rank wants. No process group needed.

A KV block is one block of tokens of one KV head: keys and values, 64 KiB at B = D = 128 in bf16. A rank owns
NP = M * NL of them and numbers them head * NL + local block. A query's selection names blocks per KV head, so
KV blocks are what ranks ask for, send and return gradients of.

The way from wishes to index lists:

1. `pack_bits`: each rank marks what it wants of every owner, one bit per KV block; all bitmaps are gathered.
2. `find_demand`: all ranks find the same broadcast blocks, which nearly all ranks want.
3. `count_rows`: the sizes of this rank's messages, the only numbers that the host must wait for.
4. `plan_rank`: lists of rows to take and the meaning of rows that arrive, made on the device.

Every rank learns the wants of all ranks. That costs P * M * NB / 8 bytes per rank and layer: 12 KB for 192K
tokens on 16 ranks, 1 MiB for 1M tokens on 256 ranks (block 128, M = 4), where the index keys that travel
anyway are 256 MiB. Steps 2 to 4 read these bytes a few dozen times, about 0.1 s of a CPU core. In return one
message serves everything: the same choice of scheme on all ranks, the union over a node's ranks, the
broadcast blocks, and the same verdict everywhere on a request that does not fit. Bitmaps sent to the owner
alone (an all-to-all, 4 KiB) would need a second message for each of these.

Schemes: *flat*, an owner sends to each rank that asks: up to P - 1 messages each way. *Hierarchical*, over
the network to one rank per node and from there to the node's others: up to N - 1 messages over the network
and L - 1 within the node, 31 and 7 at 256 ranks on nodes of 8 in place of 255. *Broadcast* blocks ("hot" in
the code) are cut in P slices that all ranks gather, so that their owners send them once.

Running example: 3 ranks, one head, 2 KV blocks each; rank 0 wants KV block 0 of rank 1; rank 1 both of rank
0; rank 2 block 0 of rank 0 and both of rank 1.

Shapes: P ranks, M KV heads, NB blocks of the pack, NL = NB / P blocks per rank, NP = M * NL KV blocks of a
rank, W = ceil(NP / 8) bytes of a bitmap, L ranks of a node, N = P / L nodes; rank = node * L + place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_train.parallel.kv_exchange.rows.bitmaps import count_bits, nonzero_of, pack_bits, unpack_bits
from msa_train.parallel.kv_exchange.rows.node_hops import Earlier, Hop, NodeView, hierarchical_hops

# Below this number of requesters a broadcast has nothing to win.
_MIN_HOT_REQUESTERS = 3
# Weight of the broadcast in the decision for it, 1: as many KV blocks as it really moves (see `find_demand`).
# Tests lower it to have one in any case.
HOT_COST = 1.0


@dataclass(slots=True, frozen=True)
class ExchangeShape:
    """Describe what all ranks know before any request."""

    cp_size: int
    "P"
    num_kv_heads: int
    "M, KV heads that a rank attends with"
    num_local_blocks: int
    "NL, blocks of each rank"
    ranks_per_node: int = 0
    "L; 0 or P: a flat exchange"
    hot_share: float = 0.0
    "share of the other ranks that make a KV block a broadcast block when they want it; 0: none"

    @property
    def num_kv_blocks(self) -> int:
        """Count the KV blocks of each rank, NP."""
        return self.num_kv_heads * self.num_local_blocks

    @property
    def num_bytes(self) -> int:
        """Count the bytes of the bitmap of one owner's KV blocks, W."""
        return -(-self.num_kv_blocks // 8)

    @property
    def hierarchical(self) -> bool:
        """Tell whether there are nodes of several ranks, and several nodes."""
        return 1 < self.ranks_per_node < self.cp_size

    @property
    def node_size(self) -> int:
        """Count the ranks of a node; all of them in a flat exchange."""
        return self.ranks_per_node if self.hierarchical else self.cp_size

    @property
    def num_nodes(self) -> int:
        """Count the nodes; one in a flat exchange."""
        return self.cp_size // self.node_size

    @property
    def hot_requesters(self) -> int:
        """Count the ranks that must want a KV block for a broadcast; at least P where there is none.

        Example: hot_share .75 -> 3 of 4 ranks, 4 of 6, 6 of 8.
        """
        if not 0 < self.hot_share <= 1:
            return self.cp_size
        share = self.hot_share * (self.cp_size - 1)
        return max(_MIN_HOT_REQUESTERS, int(share) + (share > int(share)))


@dataclass(slots=True)
class Demand:
    """Hold what all ranks want; the same on all of them."""

    shape: ExchangeShape
    "of the exchange"
    bits: Tensor
    "[P, P, W] uint8 bitmaps by requester and owner, broadcast blocks left out"
    counts: Tensor
    "[P, P] int64 KV blocks marked in `bits`"
    hot: Tensor
    "[P, NP] bool broadcast blocks, by owner"
    wanted: Tensor
    "[P] int64 KV blocks that each rank wants, broadcast ones included"


def find_demand(bits: Tensor, shape: ExchangeShape) -> Demand:
    """Separate broadcast blocks from the others where that spares the busiest rank.

    Args:
        bits: [P, P, W] uint8, all requests by requester and owner.
        shape: of the exchange.

    Example: 4 ranks of 2 KV blocks, hot_share .75; ranks 1 to 3 want KV block 0 of rank 0, rank 3 KV block 1
    too. Block 0 has 3 requesters, enough. Rank 0 would send 4 rows; with a broadcast it sends 1 row, and the
    broadcast costs 1 + 1 / 4. So hot[0] is [True, False], counts[3, 0] is 1, wanted is [0, 1, 1, 2].
    """
    counts = count_bits(bits)
    wanted = counts.sum(1)
    if shape.hot_requesters >= shape.cp_size:
        none = torch.zeros(shape.cp_size, shape.num_kv_blocks, dtype=torch.bool, device=bits.device)
        return Demand(shape, bits, counts, none, wanted)
    plain = Demand(shape, bits, counts, popularity(bits, shape) >= shape.hot_requesters, wanted)
    others = bits & ~pack_bits(plain.hot)
    split = Demand(shape, others, count_bits(others), plain.hot, wanted)
    # A broadcast of H blocks brings every rank H / P and then H rows. Without it owners send each block
    # to up to P - 1 ranks. So it pays where one owner has most of them, and not where all own the same share:
    # about H rows each way then. Decided on the device, so that the host need not wait.
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
    """Find the most rows that a rank sends or receives, broadcasts apart; with nodes: over the network."""
    loads = find_loads(demand)
    return torch.maximum(loads.send[0].max(), loads.receive[0].max())


def popularity(bits: Tensor, shape: ExchangeShape) -> Tensor:
    """Count the ranks that want each KV block: [P, P, W] uint8 -> [P, NP] int32, by owner.

    Running example -> [[2, 1], [2, 1], [0, 0]].
    """
    planes = [((bits >> bit) & 1).sum(0, dtype=torch.int32) for bit in range(8)]
    return torch.stack(planes, dim=-1).flatten(-2)[:, : shape.num_kv_blocks]


@dataclass(slots=True)
class Loads:
    """Hold the KV blocks that every rank sends and receives, by hop (one, or outer and inner)."""

    send: list[Tensor]
    "[P] int64 for each hop"
    receive: list[Tensor]
    "[P] int64 for each hop"
    hot: Tensor
    "scalar int64, broadcast blocks of all owners"


def find_loads(demand: Demand, crossed: Tensor | None = None) -> Loads:
    """Count the loads of all ranks: for the cost of a scheme, and for simulation.

    crossed: [N, P, W] uint8, by node, KV blocks that an earlier slice of queries has brought there; None:
    none. Running example -> send [[3, 3, 0]], receive [[1, 2, 3]].
    """
    shape, bits = demand.shape, demand.bits
    hot = demand.hot.sum()
    if not shape.hierarchical:
        return Loads([demand.counts.sum(0)], [demand.counts.sum(1)], hot)
    L, N = shape.node_size, shape.num_nodes
    union = node_union(bits, shape)
    if crossed is not None:
        union = union & ~crossed
    # [requesting node, owner's node, owner's place]
    crossing = count_bits(union).view(N, N, L)
    own_node = torch.arange(N, device=bits.device)
    crossing[own_node, own_node] = 0
    # [requesting node, requester's place, owner's place]: what the rank in the owner's place hands on
    handed = demand.counts.view(N, L, N, L).sum(2)
    # KV blocks that a rank fetched from another node for itself do not travel again.
    for place in range(L):
        handed[:, place, place] = 0
    return Loads(
        [crossing.sum(0).flatten(), handed.sum(1).flatten()],
        [crossing.sum(1).flatten(), handed.sum(2).flatten()],
        hot,
    )


def node_union(bits: Tensor, shape: ExchangeShape) -> Tensor:
    """Join the wishes of each node's ranks: [P, P, W] uint8 by requester and owner -> [N, P, W]."""
    by_node = bits.view(shape.num_nodes, shape.node_size, shape.cp_size, -1)
    union = by_node[:, 0]
    for place in range(1, shape.node_size):
        union = union | by_node[:, place]
    return union


@dataclass(slots=True)
class RankPlan:
    """Hold one rank's part of an exchange. R fetched rows, each a KV block.

    A flat plan has one hop over all ranks, from own KV blocks to fetched rows. A hierarchical one has two:
    over the ranks in the same place of all nodes, from own KV blocks to rows in transit; then over the node's
    ranks, from own KV blocks followed by rows in transit to fetched rows.
    """

    hops: list[Hop]
    "one (flat) or two (hierarchical: outer, inner)"
    group: Tensor
    "[R] int64 KV head of every fetched row, in order of arrival"
    block_of_owner: Tensor
    "[R] int64 local block of every fetched row at its owner"
    owner: Tensor
    "[R] int64 owner of every fetched row"
    hot_rows: list[int]
    "[P] broadcast blocks of each owner"
    hot_pairs: Tensor
    "[hot_rows[rank]] int64 own broadcast blocks, numbered head * NL + local block"
    hot_group: Tensor
    "[sum(hot_rows)] int64 KV head of every broadcast block, by owner"
    hot_block_of_owner: Tensor
    "[sum(hot_rows)] int64 local block of every broadcast block at its owner"
    hot_owner: Tensor
    "[sum(hot_rows)] int64 owner of every broadcast block"

    @property
    def num_rows(self) -> int:
        """Count the fetched rows, broadcast ones left out."""
        return self.owner.shape[0]

    @property
    def num_hot(self) -> int:
        """Count the broadcast blocks of all owners."""
        return sum(self.hot_rows)


def count_rows(demand: Demand, rank: int, earlier: Earlier | None = None) -> Tensor:
    """Count what the host needs for `plan_rank`, in its order: [3 P] int64, hierarchical [2 N + 2 L + P].

    earlier: what earlier slices of queries brought across the network; None: nothing.

    Flat: rows to each rank, rows from each, broadcast blocks of each. Running example, rank 0:
    [0, 2, 1, 0, 1, 0, 0, 0, 0]. At 256 ranks 768 numbers, with nodes of 8 336.
    """
    shape, hot = demand.shape, demand.hot.sum(1)
    if not shape.hierarchical:
        return torch.cat((demand.counts[:, rank], demand.counts[rank], hot))
    view = NodeView(demand.bits, rank, shape.node_size, shape.num_kv_blocks, earlier)
    outer_send, outer_receive = view.asked_by_node.sum(1), view.transit.sum(1)
    inner_send = view.mates.sum((1, 2))
    inner_receive = demand.counts[rank].view(shape.num_nodes, shape.node_size).sum(0)
    return torch.cat((outer_send, outer_receive, inner_send, inner_receive, hot))


def plan_rank(demand: Demand, rank: int, counts: list[int], earlier: Earlier | None = None) -> RankPlan:
    """Make the index lists of one rank.

    Owners send in ascending order of KV blocks, and requesters know their own marks: so both sides agree on
    the order of rows, and no row needs a label.

    Args:
        demand: the same on all ranks.
        rank: whose plan.
        counts: of `count_rows`, on the host.
        earlier: as of `count_rows`; in a hierarchical exchange alone.

    Running example, rank 0: take [0, 1, 0], send [0, 2, 1] (both to rank 1, block 0 to rank 2), receive
    [0, 1, 0]; owner [1], block_of_owner [0]. Rank 2 sends nothing and receives [1, 2, 0]: owner [0, 1, 1],
    block_of_owner [0, 0, 1]. With 2 heads and 2 blocks, KV block 3 has group 1 and block_of_owner 1.
    """
    shape, P, NP = demand.shape, demand.shape.cp_size, demand.shape.num_kv_blocks
    hot_rows = counts[-P:]
    if shape.hierarchical:
        view = NodeView(demand.bits, rank, shape.node_size, NP, earlier)
        hops, owner, pair = hierarchical_hops(view, counts)
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

"""Pass selections through the exchange's own planner: KV blocks that all ranks want, and rows that travel.

A KV block is one block of one KV head; a row of the exchange is one KV block. Ulysses groups: with head_size
u the innermost u ranks hold u shards as one sequence shard and M / u KV heads each; the exchange runs among
P' = P / u such ranks, once per place in the Ulysses group.

Cost: a bitmap has one bit per requester and KV block, so all of them have P' * M * NB / 8 bytes: 4 MiB for 4M
tokens (NB = 32768 blocks), 256 ranks and 4 KV heads. Selections are asked one rank at a time, [M, NB] each.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from msa_train.parallel.kv_exchange.plan import (
    Demand,
    ExchangeShape,
    count_bits,
    find_demand,
    find_loads,
    node_union,
    pack_bits,
    popularity,
    unpack_bits,
)
from msa_train.simulate.costs.collective_cost import CollectiveCost, side_by_side
from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.placement import Placement
from msa_train.simulate.selections.recorded import Selections

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(slots=True)
class Wants:
    """Hold the requests of all ranks of a layer."""

    placement: Placement
    "of the P' sequence shards"
    num_kv_heads: int
    "KV heads of one place of a Ulysses group, M / u"
    bits: list[torch.Tensor]
    "[u] of [P', P', W] uint8: bitmaps of KV blocks by requester and owner, as the planner takes them"
    pairs: IntArray
    "[P'] int64, remote KV blocks that each rank selected, of all M KV heads"
    planned: "dict[tuple[int, bool, float, int], list[Hops]]" = field(default_factory=dict, repr=False)
    "plans made so far, by node size, hierarchical, hot_share and slices of queries"

    @property
    def f(self) -> float:
        """Return selected over all remote KV blocks, mean over ranks; 0 where nothing is remote.

        Example: 2 ranks, 4 blocks, one KV head; rank 1 selects one of rank 0's two blocks, rank 0 none of
        rank 1's: mean(0, 1) / 2 = 0.25.
        """
        placement = self.placement
        # NB blocks without the NB / P' own ones, for each of the M / u KV heads of the u places
        remote = placement.num_blocks - placement.num_blocks // placement.cp_size
        total = remote * self.num_kv_heads * len(self.bits)
        return float(self.pairs.mean()) / total if total else 0.0

    @property
    def bitmap_bytes(self) -> int:
        """Return W, bytes of one owner's KV blocks in one requester's bitmap: ceil(M / u * NL / 8)."""
        return self.bits[0].shape[2]


def collect_wants(selections: Selections, placement: Placement, num_kv_heads: int, head_size: int) -> Wants:
    """Ask the selections for every rank's needs, one rank at a time.

    Args:
        selections: what is replayed.
        placement: of the P' sequence shards.
        num_kv_heads: M, a multiple of head_size.
        head_size: u, the Ulysses degree.

    Example: 4 ranks with one block each, one KV head, every block before a query selected -> bits [[0], [0],
    [0], [0]], [[1], [0], [0], [0]], [[1], [1], [0], [0]], [[1], [1], [1], [0]] and pairs [0, 1, 2, 3].
    """
    size, per_place = placement.cp_size, num_kv_heads // head_size
    width = -(-per_place * placement.order.shape[1] // 8)
    bits = [np.empty((size, size, width), dtype=np.uint8) for _ in range(head_size)]
    pairs = np.empty(size, dtype=np.int64)
    for rank in range(size):
        # [M, P', NL]: blocks in the order of their owners
        wanted = selections.needed(placement, rank)[:, placement.order]
        # own blocks need no request
        wanted[:, rank] = False
        pairs[rank] = np.count_nonzero(wanted)
        for place in range(head_size):
            groups = wanted[place * per_place : (place + 1) * per_place]
            # [P', M / u * NL]: a bitmap numbers the KV blocks of an owner by head, then by block
            flat = groups.transpose(1, 0, 2).reshape(size, -1)
            bits[place][rank] = np.packbits(flat, axis=1, bitorder="little")
    return Wants(placement, per_place, [torch.from_numpy(b) for b in bits], pairs)


@dataclass(slots=True)
class Hops:
    """Hold what an exchange moves, in rows; a row is one KV block, one block of one KV head."""

    hops: list[CollectiveCost]
    "of u * P' ranks, in rows: one in a flat exchange, inter-node and intra-node in a hierarchical one"
    fetched: IntArray
    "[u * P'] int64, KV blocks that each rank has fetched afterwards, broadcast blocks left out"
    hot: IntArray
    "[u, P'] int64, broadcast blocks by place and owner"


def exchange_shape(wants: Wants, cluster: Cluster, *, hierarchical: bool, hot_share: float) -> ExchangeShape:
    """Describe this exchange as the planner wants it; arguments as of `exchange_rows`."""
    size = wants.placement.cp_size
    return ExchangeShape(
        cp_size=size,
        num_kv_heads=wants.num_kv_heads,
        num_local_blocks=wants.placement.order.shape[1],
        ranks_per_node=min(cluster.gpus_per_node, size) if hierarchical else 0,
        hot_share=hot_share,
    )


def exchange_rows(wants: Wants, cluster: Cluster, *, hierarchical: bool, hot_share: float) -> Hops:
    """Plan the exchange and count the rows of each hop; a plan is made once and kept in `wants`.

    Args:
        wants: of all ranks.
        cluster: gives the nodes; of the P' ranks, see `outer_cluster`.
        hierarchical: over the network to one rank per node and from there to the node's others.
        hot_share: share of the other ranks that must want a KV block for it to be broadcast, 0 for none.

    Example: the 4 ranks of `collect_wants` in 2 nodes. Flat: ranks 0 and 1 send 2 rows each inter-node, and
    ranks 0 and 2 one row each intra-node. Hierarchical: ranks 0 and 1 send 1 row each inter-node, then ranks
    0 to 3 send 1, 0, 2 and 1 rows intra-node. Fetched are [0, 1, 2, 3] either way.
    """
    return sliced_rows(wants, cluster, hierarchical=hierarchical, hot_share=hot_share, slices=1)[0]


def sliced_rows(
    wants: Wants, cluster: Cluster, *, hierarchical: bool, hot_share: float, slices: int
) -> list[Hops]:
    """Plan an exchange in which queries select in slices: the rows of each slice, as `exchange_rows`.

    A KV block travels with the first slice that wants it, and crosses to a node once. Which slice that is
    nobody knows here: broadcast blocks, which nearly all ranks want, are taken to be found in the first
    slice, all others evenly, at random. Real queries are kinder: what many of them choose is found early.
    """
    # several schemes and `auto` ask for the same plan
    key = (cluster.gpus_per_node, hierarchical, hot_share, slices)
    if key not in wants.planned:
        shape = exchange_shape(wants, cluster, hierarchical=hierarchical, hot_share=hot_share)
        places = [_place_slices(bits, shape, cluster, slices) for bits in wants.bits]
        wants.planned[key] = [_all_places(list(plans)) for plans in zip(*places, strict=True)]
    return wants.planned[key]


def _place_slices(bits: torch.Tensor, shape: ExchangeShape, cluster: Cluster, slices: int) -> list["_Place"]:
    """Plan the slices of one place of the Ulysses groups."""
    crossed = None
    plans: list[_Place] = []
    for part in _slice_bits(bits, shape, slices):
        demand = find_demand(part, shape)
        plans.append(_place_rows(demand, cluster, crossed))
        if shape.hierarchical:
            union = node_union(demand.bits, shape)
            crossed = union if crossed is None else crossed | union
    return plans


def _slice_bits(bits: torch.Tensor, shape: ExchangeShape, slices: int) -> list[torch.Tensor]:
    """Divide requests among slices: [P, P, W] uint8 -> `slices` of them, disjoint, with the same union."""
    if slices == 1:
        return [bits]
    number = torch.Generator().manual_seed(0)
    size, pairs = shape.cp_size, shape.num_kv_blocks
    drawn = torch.randint(slices, (size, size, pairs), generator=number, dtype=torch.uint8)
    drawn[:, popularity(bits, shape) >= shape.hot_requesters] = 0
    wanted = unpack_bits(bits, pairs)
    return [pack_bits(wanted & (drawn == index)) for index in range(slices)]


def _all_places(plans: list["_Place"]) -> Hops:
    hops = [side_by_side([plan[0][hop] for plan in plans]) for hop in range(len(plans[0][0]))]
    return Hops(
        hops=hops,
        fetched=np.concatenate([plan[1] for plan in plans]),
        hot=np.stack([plan[2] for plan in plans]),
    )


# Hops in rows, KV blocks fetched per rank, broadcast blocks per owner.
_Place = tuple[list[CollectiveCost], IntArray, IntArray]


def _place_rows(demand: Demand, cluster: Cluster, crossed: torch.Tensor | None) -> _Place:
    """Count one place; crossed: see `find_loads`."""
    # find_demand has already taken broadcast blocks out of the bitmaps
    shape, hot = demand.shape, demand.hot.sum(1).numpy()
    counts = count_bits(demand.bits).numpy()
    if not shape.hierarchical:
        node = np.arange(shape.cp_size) // cluster.gpus_per_node
        near = counts * (node[:, None] == node[None, :])
        far = counts - near
        wire = CollectiveCost(
            near.sum(0).astype(float), near.sum(1).astype(float), far.sum(0).astype(float),
            far.sum(1).astype(float),
            intra_node_steps=int(near.any()), inter_node_steps=int(far.any()),
        )  # fmt: skip
        return [wire], counts.sum(1), hot
    # first hop: to the rank at the owner's place in the requester's node; second hop: inside that node
    loads = find_loads(demand, crossed)
    (out_far, out_near), (in_far, in_near) = (
        [x.numpy().astype(float) for x in loads.send],
        [x.numpy().astype(float) for x in loads.receive],
    )
    none = np.zeros(shape.cp_size)
    hops = [
        CollectiveCost(none, none, out_far, in_far, inter_node_steps=1),
        CollectiveCost(out_near, in_near, none, none, intra_node_steps=1),
    ]
    return hops, counts.sum(1), hot


def requested_by_owner(wants: Wants) -> IntArray:
    """Return [P', P'] int64, KV blocks of all KV heads by requester and owner.

    Example: the 4 ranks of `collect_wants` -> [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]].
    """
    return sum((count_bits(bits).numpy() for bits in wants.bits), np.zeros(1, dtype=np.int64))

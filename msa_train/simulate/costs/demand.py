"""Selections through the exchange's own planner: what all ranks want, and what therefore travels.

Head-parallel ranks: with head_size u the innermost u ranks hold u shards as one sequence shard and M / u KV
groups each; the exchange runs among P' = P / u such ranks, once per place in the inner group.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from msa_train.parallel.kv_exchange.plan import Demand, ExchangeShape, count_bits, find_demand, find_loads
from msa_train.simulate.costs.collective_cost import CollectiveCost, side_by_side
from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.placement import Placement
from msa_train.simulate.selections.recorded import Selections

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(slots=True)
class Wants:
    """Requests of all ranks of a layer.

    bits: [u] of [P', P', W] uint8, by requester and owner, as the planner takes them. pairs: [P'] remote
    pairs that each rank selected, all groups. num_groups: of one place, M / u.
    """

    placement: Placement
    num_groups: int
    bits: list[torch.Tensor]
    pairs: IntArray
    planned: "dict[tuple[int, bool, float], Hops]" = field(default_factory=dict, repr=False)
    "plans made so far, by node size, hierarchical and hot_share"

    @property
    def f(self) -> float:
        """Selected remote pairs over all remote pairs, mean over ranks; 0 where nothing is remote."""
        placement = self.placement
        remote = placement.num_blocks - placement.num_blocks // placement.cp_size
        total = remote * self.num_groups * len(self.bits)
        return float(self.pairs.mean()) / total if total else 0.0

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of one owner's pairs in one requester's bitmap."""
        return self.bits[0].shape[2]


def collect_wants(selections: Selections, placement: Placement, num_kv_heads: int, head_size: int) -> Wants:
    """Ask the selections for every rank's needs, one rank at a time.

    Args:
        selections: what is replayed.
        placement: of the P' sequence shards.
        num_kv_heads: M, a multiple of head_size.
        head_size: u.
    """
    size, per_place = placement.cp_size, num_kv_heads // head_size
    width = -(-per_place * placement.order.shape[1] // 8)
    bits = [np.empty((size, size, width), dtype=np.uint8) for _ in range(head_size)]
    pairs = np.empty(size, dtype=np.int64)
    for rank in range(size):
        # [M, P', NL]: blocks in the order of their owners
        wanted = selections.needed(placement, rank)[:, placement.order]
        wanted[:, rank] = False
        pairs[rank] = np.count_nonzero(wanted)
        for place in range(head_size):
            groups = wanted[place * per_place : (place + 1) * per_place]
            flat = groups.transpose(1, 0, 2).reshape(size, -1)
            bits[place][rank] = np.packbits(flat, axis=1, bitorder="little")
    return Wants(placement, per_place, [torch.from_numpy(b) for b in bits], pairs)


@dataclass(slots=True)
class Hops:
    """What an exchange of KV blocks moves; a row is one block of one KV head."""

    hops: list[CollectiveCost]
    "[u], in rows"
    fetched: IntArray
    "[u * P'] blocks that each rank holds afterwards, hot ones left out"
    hot: IntArray
    "[u, P'] hot blocks by owner"


def exchange_shape(wants: Wants, cluster: Cluster, *, hierarchical: bool, hot_share: float) -> ExchangeShape:
    """The planner's view of this exchange; arguments as of `exchange_rows`."""
    size = wants.placement.cp_size
    return ExchangeShape(
        cp_size=size,
        num_groups=wants.num_groups,
        num_local_blocks=wants.placement.order.shape[1],
        ranks_per_node=min(cluster.gpus_per_node, size) if hierarchical else 0,
        hot_share=hot_share,
    )


def exchange_rows(wants: Wants, cluster: Cluster, *, hierarchical: bool, hot_share: float) -> Hops:
    """Plan the exchange and count.

    Args:
        wants: of all ranks.
        cluster: gives the nodes; of the P' ranks, see `outer_cluster`.
        hierarchical: over the network to one rank per node and from there to the node's others.
        hot_share: share of the other ranks that make a pair hot, 0 for none.
    """
    key = (cluster.gpus_per_node, hierarchical, hot_share)
    if key not in wants.planned:
        wants.planned[key] = _plan_rows(wants, cluster, hierarchical=hierarchical, hot_share=hot_share)
    return wants.planned[key]


def _plan_rows(wants: Wants, cluster: Cluster, *, hierarchical: bool, hot_share: float) -> Hops:
    shape = exchange_shape(wants, cluster, hierarchical=hierarchical, hot_share=hot_share)
    plans = [_place_rows(find_demand(bits, shape), cluster) for bits in wants.bits]
    hops = [side_by_side([plan[0][hop] for plan in plans]) for hop in range(len(plans[0][0]))]
    return Hops(
        hops=hops,
        fetched=np.concatenate([plan[1] for plan in plans]),
        hot=np.stack([plan[2] for plan in plans]),
    )


def _place_rows(demand: Demand, cluster: Cluster) -> tuple[list[CollectiveCost], IntArray, IntArray]:
    """Rows of one place: hops, fetched pairs per rank, hot pairs per owner."""
    shape, hot = demand.shape, demand.hot.sum(1).numpy()
    counts = count_bits(demand.bits).numpy()
    if not shape.hierarchical:
        node = np.arange(shape.cp_size) // cluster.gpus_per_node
        near = counts * (node[:, None] == node[None, :])
        far = counts - near
        wire = CollectiveCost(
            near.sum(0).astype(float), near.sum(1).astype(float), far.sum(0).astype(float),
            far.sum(1).astype(float),
            near_steps=int(near.any()), far_steps=int(far.any()),
        )  # fmt: skip
        return [wire], counts.sum(1), hot
    loads = find_loads(demand)
    (out_far, out_near), (in_far, in_near) = (
        [x.numpy().astype(float) for x in loads.send],
        [x.numpy().astype(float) for x in loads.receive],
    )
    none = np.zeros(shape.cp_size)
    hops = [
        CollectiveCost(none, none, out_far, in_far, far_steps=1),
        CollectiveCost(out_near, in_near, none, none, near_steps=1),
    ]
    return hops, counts.sum(1), hot


def requested_by_owner(wants: Wants) -> IntArray:
    """[P', P'] pairs of all groups by requester and owner."""
    return sum((count_bits(bits).numpy() for bits in wants.bits), np.zeros(1, dtype=np.int64))

"""Count the collectives of broadcast blocks (`parallel.kv_exchange.hot_blocks`).

All broadcast blocks lie one after the other in a buffer that is cut in P' equal slices, so that every rank
carries the same bytes, whoever owns the blocks: a scatter of slices, then an all-gather. Gradients: a sum of
slices (an all-to-all, or two by node), then each slice's part to its owners.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msa_train.simulate.costs import collective_cost
from msa_train.simulate.costs.collective_cost import CollectiveCost
from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.layer_shape import LayerShape


@dataclass(slots=True)
class HotWires:
    """Hold the collectives of broadcast blocks in order; empty lists where no block is broadcast."""

    forward: list[CollectiveCost]
    "scatter and gathers of keys and values, bytes"
    backward: list[CollectiveCost]
    "sums of gradients and their way home, bytes"
    started_forward: int = 1
    "first ones of `forward` that run under computing"
    started_backward: int = 1
    "first ones of `backward` that run under computing"

    def seconds(self, way: list[CollectiveCost], cluster: Cluster) -> tuple[float, float]:
        """Return the seconds of what starts at once, and of what follows it."""
        started = self.started_forward if way is self.forward else self.started_backward
        times = [wire.time_s(cluster) for wire in way]
        return sum(times[:started]), sum(times[started:])


def hot_wires(hot: NDArray[np.int64], shape: LayerShape, cluster: Cluster, node_size: int) -> HotWires:
    """Plan the broadcast and the sum of its gradients.

    Args:
        hot: [u, P'] broadcast blocks by place and owner.
        shape: of the layer.
        cluster: as the ranks of one place see it.
        node_size: ranks of a node, P' where the exchange is flat.

    Example: 4 ranks in a flat exchange, [3, 0, 2, 0] blocks of 32 bytes (gradients 48): 5 * 32 bytes in
    slices of 40. The scatter sends [56, 0, 40, 0] bytes, the gather 120 from each rank, the sum of gradients
    3 * 60 from each.
    """
    if not hot.any():
        return HotWires([], [])
    plans = [_one(place, shape, cluster, node_size) for place in hot]
    forward = [
        collective_cost.side_by_side(list(steps)) for steps in zip(*(p.forward for p in plans), strict=True)
    ]
    backward = [
        collective_cost.side_by_side(list(steps)) for steps in zip(*(p.backward for p in plans), strict=True)
    ]
    return HotWires(forward, backward, started_backward=len(backward) - 1)


def spans(hot: NDArray[np.int64], elements: int, node_size: int) -> tuple[NDArray[np.int64], int]:
    """Return the elements of every rank's slice by owner, and the size of a slice.

    Args:
        hot: [P'] broadcast blocks by owner.
        elements: of a block.
        node_size: ranks of a node.

    Returns:
        [P', P'] int64 by rank of the slice and owner; see `HotSlices.span`.

    Example: 3 ranks, [3, 0, 2] blocks of 2 elements: slices of 4 elements -> [[4, 0, 0], [2, 0, 2], [0, 0,
    2]]. 4 ranks in 2 nodes, [2, 0, 0, 2] blocks of 2 elements: slices of 2, ranks 0, 2, 1, 3 in the buffer's
    order -> [[2, 0, 0, 0], [0, 0, 0, 2], [2, 0, 0, 0], [0, 0, 0, 2]].
    """
    size = hot.shape[0]
    ends = hot.cumsum() * elements
    # rounded up: the last slice may be partly empty, and is sent whole by the gather all the same
    slice_size = -(-int(ends[-1]) // size)
    rank = np.arange(size)
    # slices of the same place in all nodes are neighbours, so that a gather between nodes gives one piece
    first = (rank % node_size * (size // node_size) + rank // node_size)[:, None] * slice_size
    overlap = np.minimum(first + slice_size, ends) - np.maximum(first, ends - hot * elements)
    return np.maximum(overlap, 0), slice_size


def _one(hot: NDArray[np.int64], shape: LayerShape, cluster: Cluster, node_size: int) -> HotWires:
    """Plan for one place of the Ulysses groups; hot: [P']."""
    size, item = hot.shape[0], shape.element_bytes
    # slices cut through blocks, so they are counted in elements; gradient rows are longer: slices of their
    # own
    parts, slice_size = spans(hot, shape.kv_block_bytes // item, node_size)
    grad_parts, grad_slice = spans(hot, shape.kv_block_grad_bytes // item, node_size)
    # owners send each rank its slice; afterwards each rank sends the summed slice back to its owners
    out = collective_cost.all_to_all(parts, item, cluster)
    home = collective_cost.all_to_all(grad_parts.T, item, cluster)
    if node_size == size:
        gathered = collective_cost.all_gather(slice_size * item, size, cluster)
        # every rank has gradients for every slice: a sum by all-to-all, added up where it arrives
        summed = collective_cost.all_to_all(np.full((size, size), grad_slice), item, cluster)
        return HotWires([out, gathered], [summed, home])
    nodes = size // node_size
    none, ones = np.zeros(size), np.ones(size)
    # between nodes a rank gets the slices of its place in the others; inside, all that its neighbours have
    rail = ones * slice_size * item * (nodes - 1)
    inside = ones * slice_size * item * nodes * (node_size - 1)
    gathers = [
        CollectiveCost(none, none, rail, rail, inter_node_steps=nodes - 1),
        CollectiveCost(inside, inside, none, none, intra_node_steps=node_size - 1),
    ]
    inner, outer = (ones * grad_slice * item * count for count in (nodes * (node_size - 1), nodes - 1))
    sums = [
        CollectiveCost(inner, inner, none, none, intra_node_steps=1),
        CollectiveCost(none, none, outer, outer, inter_node_steps=1),
    ]
    return HotWires([out, *gathers], [*sums, home])

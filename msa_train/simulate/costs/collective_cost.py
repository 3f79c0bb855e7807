"""Bytes of collectives per rank, by link, and the time they take.

A rank's links (to and from its node, to and from other nodes) work at once; a collective ends when the
fullest link of any rank is done. Latency is paid per message in a row: P - 1 in rings, one in an all-to-
all.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msa_train.simulate.inputs.cluster import Cluster

FloatArray = NDArray[np.float64]


@dataclass(slots=True)
class CollectiveCost:
    """One collective. Arrays [P] in bytes: sent and received inside the node (near) and beyond (far).

    near_steps, far_steps: messages that wait for each other.
    """

    near_sent: FloatArray
    near_received: FloatArray
    far_sent: FloatArray
    far_received: FloatArray
    near_steps: int = 0
    far_steps: int = 0

    @property
    def sent(self) -> FloatArray:
        """[P] bytes that each rank sends."""
        return self.near_sent + self.far_sent

    @property
    def received(self) -> FloatArray:
        """[P] bytes that each rank receives."""
        return self.near_received + self.far_received

    def reversed(self) -> "CollectiveCost":
        """The way back: who received sends."""
        return CollectiveCost(
            self.near_received,
            self.near_sent,
            self.far_received,
            self.far_sent,
            self.near_steps,
            self.far_steps,
        )

    def scaled(self, factor: float) -> "CollectiveCost":
        """The same pattern with other row sizes."""
        return CollectiveCost(
            self.near_sent * factor,
            self.near_received * factor,
            self.far_sent * factor,
            self.far_received * factor,
            self.near_steps,
            self.far_steps,
        )

    def time_s(self, cluster: Cluster) -> float:
        """Seconds until the last rank is done: the slowest of its links, its node's uplink, its processor."""
        shared = cluster.one_link
        near = max((self.near_sent + shared * self.far_sent).max(), self._near_in(shared).max())
        far = max(self.far_sent.max(), self.far_received.max())
        times = [near / cluster.node_rate, far / cluster.network_rate]
        if cluster.node_uplink_bytes and self.far_sent.shape[0] > cluster.gpus_per_node:
            both = [
                x.reshape(-1, cluster.gpus_per_node).sum(1).max() for x in (self.far_sent, self.far_received)
            ]
            times.append(max(both) / (cluster.node_uplink_bytes * cluster.link_efficiency))
        times.append(self.received.max() * cluster.host_s_per_byte / cluster.compute_share)
        latency = self.near_steps * cluster.node_latency_s + self.far_steps * cluster.network_latency_s
        return float(max(times)) + latency

    def _near_in(self, shared: bool) -> FloatArray:
        return self.near_received + shared * self.far_received


def node_of(cluster: Cluster, cp_size: int) -> NDArray[np.int64]:
    """[P] node of each rank."""
    return np.arange(cp_size) // cluster.gpus_per_node


def nothing(cp_size: int) -> CollectiveCost:
    """A collective that moves nothing."""
    none = np.zeros(cp_size)
    return CollectiveCost(none, none, none, none)


def all_to_all(rows: NDArray[np.number], row_bytes: float, cluster: Cluster) -> CollectiveCost:
    """Everyone to everyone at once; rows: [P, P] by receiver and sender, the diagonal does not travel."""
    cp_size = rows.shape[0]
    node = node_of(cluster, cp_size)
    rows = rows * (1 - np.eye(cp_size, dtype=np.int64))
    near = rows * (node[:, None] == node[None, :])
    far = rows - near
    return CollectiveCost(
        near.sum(0) * row_bytes,
        near.sum(1) * row_bytes,
        far.sum(0) * row_bytes,
        far.sum(1) * row_bytes,
        near_steps=int(bool(near.any())),
        far_steps=int(bool(far.any())),
    )


def all_gather(shard_bytes: float, cp_size: int, cluster: Cluster) -> CollectiveCost:
    """Every rank gets every shard.

    With `multi_rail_collectives` a byte crosses the network once per node, through the cards of all its
    ranks in equal parts, and is handed on inside; else one ring runs through all ranks, and the ranks at a
    node's borders carry everything.
    """
    if cp_size == 1:
        return nothing(1)
    total = np.full(cp_size, (cp_size - 1) * shard_bytes)
    nodes = cluster.num_nodes(cp_size)
    per_node = cp_size // nodes
    if nodes == 1:
        return CollectiveCost(total, total, 0 * total, 0 * total, near_steps=cp_size - 1)
    near_steps, far_steps = cp_size - nodes, nodes
    if cluster.multi_rail_collectives or per_node == 1:
        far = np.full(cp_size, (cp_size - per_node) * shard_bytes / per_node)
        near = (total - far) * (per_node > 1)
        # rails run side by side: P / L steps between nodes, then the node's own
        return CollectiveCost(near, near, far, far, near_steps=per_node - 1, far_steps=nodes - 1)
    place = np.arange(cp_size) % per_node
    sends_far, gets_far = place == per_node - 1, place == 0
    return CollectiveCost(
        total * ~sends_far, total * ~gets_far, total * sends_far, total * gets_far, near_steps, far_steps
    )


def reduce_scatter(shard_bytes: float, cp_size: int, cluster: Cluster) -> CollectiveCost:
    """Sum of everyone's P shards, one to each rank: an all-gather's way back."""
    return all_gather(shard_bytes, cp_size, cluster).reversed()


def all_reduce(shard_bytes: float, cp_size: int, cluster: Cluster) -> CollectiveCost:
    """Sum of P shards, all of it to everyone: reduce-scatter, then all-gather."""
    once = all_gather(shard_bytes, cp_size, cluster)
    return CollectiveCost(
        2 * once.near_sent,
        2 * once.near_received,
        2 * once.far_sent,
        2 * once.far_received,
        2 * once.near_steps,
        2 * once.far_steps,
    )


def shift(num_bytes: float, cp_size: int, cluster: Cluster) -> CollectiveCost:
    """One step of a ring: everyone to the next rank."""
    if cp_size == 1:
        return nothing(1)
    node = node_of(cluster, cp_size)
    to_far, from_far = node != np.roll(node, -1), node != np.roll(node, 1)
    each = np.full(cp_size, float(num_bytes))
    far = bool(to_far.any())
    return CollectiveCost(
        each * ~to_far,
        each * ~from_far,
        each * to_far,
        each * from_far,
        near_steps=int(not far),
        far_steps=int(far),
    )


def side_by_side(parts: list[CollectiveCost]) -> CollectiveCost:
    """Collectives of different ranks at the same time, as one."""
    if len(parts) == 1:
        return parts[0]
    return CollectiveCost(
        np.concatenate([wire.near_sent for wire in parts]),
        np.concatenate([wire.near_received for wire in parts]),
        np.concatenate([wire.far_sent for wire in parts]),
        np.concatenate([wire.far_received for wire in parts]),
        max(wire.near_steps for wire in parts),
        max(wire.far_steps for wire in parts),
    )

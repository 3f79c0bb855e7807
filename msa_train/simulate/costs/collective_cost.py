"""Count the bytes of collectives per rank and link, and the time they take.

A rank's links (intra-node and inter-node) work at once; a collective ends when the fullest link of any rank
is done. Latency is paid per message in a row: about P in rings, one in an all-to-all. This is the alpha-beta
model of collectives (Thakur, Rabenseifner, Gropp 2005), with one bandwidth per kind of link. `near` in a name
is intra-node, `far` is inter-node.

Every function needs O(P) numbers, `all_to_all` the P x P table that it is given.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msa_train.simulate.inputs.cluster import Cluster

FloatArray = NDArray[np.float64]


@dataclass(slots=True)
class CollectiveCost:
    """Hold the bytes of one collective, or rows of any unit until `scaled` makes bytes of them."""

    intra_node_sent: FloatArray
    "[P] float64, bytes that each rank sends to ranks of its node"
    intra_node_received: FloatArray
    "[P] float64, bytes that each rank receives from ranks of its node"
    inter_node_sent: FloatArray
    "[P] float64, bytes that each rank sends to other nodes"
    inter_node_received: FloatArray
    "[P] float64, bytes that each rank receives from other nodes"
    intra_node_steps: int = 0
    "intra-node messages that wait for one another"
    inter_node_steps: int = 0
    "inter-node messages that wait for one another"

    @property
    def sent(self) -> FloatArray:
        """Return [P] bytes that each rank sends."""
        return self.intra_node_sent + self.inter_node_sent

    @property
    def received(self) -> FloatArray:
        """Return [P] bytes that each rank receives."""
        return self.intra_node_received + self.inter_node_received

    def reversed(self) -> "CollectiveCost":
        """Return the way back: each rank sends what it received."""
        return CollectiveCost(
            self.intra_node_received,
            self.intra_node_sent,
            self.inter_node_received,
            self.inter_node_sent,
            self.intra_node_steps,
            self.inter_node_steps,
        )

    def scaled(self, factor: float) -> "CollectiveCost":
        """Return the same pattern with other row sizes, e.g. rows times bytes of a row."""
        return CollectiveCost(
            self.intra_node_sent * factor,
            self.intra_node_received * factor,
            self.inter_node_sent * factor,
            self.inter_node_received * factor,
            self.intra_node_steps,
            self.inter_node_steps,
        )

    def time_s(self, cluster: Cluster) -> float:
        """Return the seconds until the last rank is done.

        The time is the slowest of a rank's links, its node's uplink and its processor, plus latencies:

            max(near / node_rate, far / network_rate, uplink, received * host_s_per_byte) + steps * latency

        Example: rank 0 of a node sends 30 bytes, rank 1 sends 10, both in one step; 10 bytes/s, latency 1 s
        -> 30 / 10 + 1 = 4 s.
        """
        # on Ethernet one card carries both kinds of messages, so far bytes count on the near link too
        shared = cluster.one_link
        near = max((self.intra_node_sent + shared * self.inter_node_sent).max(), self._near_in(shared).max())
        far = max(self.inter_node_sent.max(), self.inter_node_received.max())
        times = [near / cluster.node_rate, far / cluster.network_rate]
        # a node's uplink is full duplex: the larger of what its ranks send and what they receive together
        if cluster.node_uplink_bytes and self.inter_node_sent.shape[0] > cluster.gpus_per_node:
            both = [
                x.reshape(-1, cluster.gpus_per_node).sum(1).max()
                for x in (self.inter_node_sent, self.inter_node_received)
            ]
            times.append(max(both) / (cluster.node_uplink_bytes * cluster.link_efficiency))
        # where processors copy every received byte, the busiest one may be slower than any link
        times.append(self.received.max() * cluster.host_s_per_byte / cluster.compute_share)
        latency = (
            self.intra_node_steps * cluster.node_latency_s + self.inter_node_steps * cluster.network_latency_s
        )
        return float(max(times)) + latency

    def _near_in(self, shared: bool) -> FloatArray:
        return self.intra_node_received + shared * self.inter_node_received


def node_of(cluster: Cluster, cp_size: int) -> NDArray[np.int64]:
    """Return [P] int64, the node of each rank.

    Example: 4 ranks, 2 per node -> [0, 0, 1, 1].
    """
    return np.arange(cp_size) // cluster.gpus_per_node


def nothing(cp_size: int) -> CollectiveCost:
    """Return a collective that moves nothing."""
    none = np.zeros(cp_size)
    return CollectiveCost(none, none, none, none)


def all_to_all(rows: NDArray[np.number], row_bytes: float, cluster: Cluster) -> CollectiveCost:
    """Count an all-to-all with rows of any number between each two ranks.

    Args:
        rows: [P, P] rows by receiver and sender; the diagonal does not travel.
        row_bytes: bytes of a row.
        cluster: gives the nodes.

    Example: rows [[9, 1], [3, 9]] of 10 bytes on one node -> sent [30, 10], received [10, 30].
    """
    cp_size = rows.shape[0]
    # rows[i, j] goes from j to i: sums over receivers (axis 0) are sent, sums over senders (axis 1) received
    node = node_of(cluster, cp_size)
    rows = rows * (1 - np.eye(cp_size, dtype=np.int64))
    near = rows * (node[:, None] == node[None, :])
    far = rows - near
    return CollectiveCost(
        near.sum(0) * row_bytes,
        near.sum(1) * row_bytes,
        far.sum(0) * row_bytes,
        far.sum(1) * row_bytes,
        intra_node_steps=int(bool(near.any())),
        inter_node_steps=int(bool(far.any())),
    )


def all_gather(shard_bytes: float, cp_size: int, cluster: Cluster) -> CollectiveCost:
    """Count an all-gather: every rank gets the shards of the P - 1 others.

    With `multi_rail_collectives` a byte crosses the network once per node, through the cards of all its
    ranks in equal parts, and is handed on inside; else one ring runs through all ranks, and the ranks at a
    node's borders carry everything.

    Args:
        shard_bytes: bytes that each rank brings.
        cp_size: P.
        cluster: gives the nodes.

    Example: 4 ranks in 2 nodes, shards of 12 bytes -> each rank sends 36 bytes, on rails 12 of them
    inter-node; in one ring ranks 1 and 3 send all their 36 inter-node, ranks 0 and 2 none.
    """
    if cp_size == 1:
        return nothing(1)
    total = np.full(cp_size, (cp_size - 1) * shard_bytes)
    nodes = cluster.num_nodes(cp_size)
    per_node = cp_size // nodes
    if nodes == 1:
        return CollectiveCost(total, total, 0 * total, 0 * total, intra_node_steps=cp_size - 1)
    if cluster.multi_rail_collectives or per_node == 1:
        # the node takes in (P - L) shards, 1 / L of them through each of its L cards; what is left of the
        # P - 1 shards that a rank receives comes from its neighbours
        far = np.full(cp_size, (cp_size - per_node) * shard_bytes / per_node)
        near = (total - far) * (per_node > 1)
        # rails run side by side: P / L - 1 steps between nodes, then the node's own L - 1
        return CollectiveCost(near, near, far, far, intra_node_steps=per_node - 1, inter_node_steps=nodes - 1)
    # the ring leaves a node at its last rank and enters the next one at its first
    place = np.arange(cp_size) % per_node
    sends_far, gets_far = place == per_node - 1, place == 0
    # P - 1 of the ring's P links, one after the other; the one left out is inside a node
    return CollectiveCost(
        total * ~sends_far,
        total * ~gets_far,
        total * sends_far,
        total * gets_far,
        intra_node_steps=cp_size - nodes - 1,
        inter_node_steps=nodes,
    )


def reduce_scatter(shard_bytes: float, cp_size: int, cluster: Cluster) -> CollectiveCost:
    """Count a reduce-scatter: every rank gets the sum of its shard, which is an all-gather's way back."""
    return all_gather(shard_bytes, cp_size, cluster).reversed()


def all_reduce(shard_bytes: float, cp_size: int, cluster: Cluster) -> CollectiveCost:
    """Count an all-reduce of P shards: a reduce-scatter, then an all-gather, twice the bytes of either.

    Example: the all-gather of 4 ranks above has 24 + 12 bytes per rank, the all-reduce 48 + 24.
    """
    once = all_gather(shard_bytes, cp_size, cluster)
    return CollectiveCost(
        2 * once.intra_node_sent,
        2 * once.intra_node_received,
        2 * once.inter_node_sent,
        2 * once.inter_node_received,
        2 * once.intra_node_steps,
        2 * once.inter_node_steps,
    )


def shift(num_bytes: float, cp_size: int, cluster: Cluster) -> CollectiveCost:
    """Count one step of a ring: every rank sends to the next one.

    Example: 4 ranks in 2 nodes, 10 bytes -> ranks 0 and 2 send intra-node, 1 and 3 inter-node.
    """
    if cp_size == 1:
        return nothing(1)
    node = node_of(cluster, cp_size)
    to_far, from_far = node != np.roll(node, -1), node != np.roll(node, 1)
    # all ranks step together, so the step has the latency of the slowest link that it uses
    each = np.full(cp_size, float(num_bytes))
    far = bool(to_far.any())
    return CollectiveCost(
        each * ~to_far,
        each * ~from_far,
        each * to_far,
        each * from_far,
        intra_node_steps=int(not far),
        inter_node_steps=int(far),
    )


def side_by_side(parts: list[CollectiveCost]) -> CollectiveCost:
    """Join collectives of different ranks that run at the same time: [P'] each -> [len(parts) * P']."""
    if len(parts) == 1:
        return parts[0]
    return CollectiveCost(
        np.concatenate([wire.intra_node_sent for wire in parts]),
        np.concatenate([wire.intra_node_received for wire in parts]),
        np.concatenate([wire.inter_node_sent for wire in parts]),
        np.concatenate([wire.inter_node_received for wire in parts]),
        max(wire.intra_node_steps for wire in parts),
        max(wire.inter_node_steps for wire in parts),
    )

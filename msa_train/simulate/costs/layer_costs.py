"""Time the parts that both kinds of layers have, and hold what a scheme's report says."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from msa_train.simulate.costs.collective_cost import CollectiveCost
from msa_train.simulate.costs.timeline import LayerTime
from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.layer_shape import LayerShape
from msa_train.simulate.inputs.placement import Placement
from msa_train.simulate.inputs.rates import KernelRates
from msa_train.simulate.inputs.scenario import Options, Scheme

FloatArray = NDArray[np.float64]


@dataclass(kw_only=True, slots=True)
class LayerCosts:
    """Time the parts of a layer on a cluster."""

    shape: LayerShape
    "sizes of the layer"
    cluster: Cluster
    "links of the P ranks"
    rates: KernelRates
    "FLOP/s and bytes per second of the kernels"
    cp_size: int
    "P, context-parallel ranks"
    options: Options
    "switches of the exchange"
    outer: Placement
    "of the P' = cp_size / head_size sequence shards, one per Ulysses group"

    @property
    def tokens(self) -> int:
        """Return T, tokens of each rank."""
        return self.outer.seq_len // self.cp_size

    @property
    def outer_cluster(self) -> Cluster:
        """Return the cluster as the ranks of one place of the Ulysses groups see it.

        A node has fewer of them, each with its own links. Example: 8 per node, head_size 4 -> 2 per node.
        """
        # each rank of the group carries its own part of the heads over its own links
        return replace(
            self.cluster, gpus_per_node=max(1, self.cluster.gpus_per_node // self.options.head_size)
        )

    def seconds(self, flops: FloatArray | float, rate: float) -> FloatArray | float:
        """Return the seconds of so many FLOPs (or bytes) at a rate per second.

        Example: 6 FLOPs at 2 FLOP/s -> 3 s; 6 s where a rank has half a device (compute_share 0.5).
        """
        return flops / (rate * self.cluster.compute_share)

    def evened(self, seconds: FloatArray) -> FloatArray:
        """Return [P'] seconds of ranks that compute side by side: sharing cores, an idle one leaves its own.

        Example: [1, 3] -> [2, 2] with compute_share 0.5, unchanged with 1.
        """
        return np.full_like(seconds, seconds.mean()) if self.cluster.compute_share < 1 else seconds

    def projections_s(self) -> float:
        """Return the seconds of query, key and value projections, forward."""
        return float(self.seconds(self.shape.qkv_flops(self.tokens), self.rates.projection_flops))

    def output_s(self) -> float:
        """Return the seconds of the output projection, forward."""
        return float(self.seconds(self.shape.output_flops(self.tokens), self.rates.projection_flops))

    def overhead_s(self) -> float:
        """Return the seconds that no size explains (launches, small operators), forward."""
        return self.rates.layer_overhead_s / self.cluster.compute_share

    def copy_s(self, num_bytes: FloatArray | float) -> FloatArray | float:
        """Return the seconds of packing, unpacking or adding rows of so many bytes."""
        return self.seconds(num_bytes, self.rates.copy_bytes)


@dataclass(slots=True)
class SchemeReport:
    """Hold times, traffic and memory of one scheme's layer call, forward and backward."""

    scheme: str
    "name of a Scheme or FullScheme"
    forward: LayerTime
    "seconds of the forward pass"
    backward: LayerTime
    "seconds of the backward pass, recomputation included"
    traffic: dict[str, list[CollectiveCost]]
    "collectives of P ranks in bytes by purpose (as CpComm.traffic names them), each in order, of both passes"
    memory_bytes: float
    "largest buffers of the exchange beside a rank's own shard, bytes of the rank that has most"
    chosen: Scheme | None = None
    "scheme that `auto` stands for; None for all others"

    @property
    def total(self) -> LayerTime:
        """Return the times of forward and backward together."""
        return self.forward + self.backward

    @property
    def sent(self) -> FloatArray:
        """Return [P] bytes that each rank sends in a layer, forward and backward."""
        return _sum([wire.sent for wires in self.traffic.values() for wire in wires])

    @property
    def received(self) -> FloatArray:
        """Return [P] bytes that each rank receives, forward and backward."""
        return _sum([wire.received for wires in self.traffic.values() for wire in wires])

    @property
    def far(self) -> FloatArray:
        """Return [P] bytes that each rank receives from other nodes, forward and backward."""
        return _sum([wire.inter_node_received for wires in self.traffic.values() for wire in wires])


def _sum(arrays: list[FloatArray]) -> FloatArray:
    return np.sum(np.stack(arrays), axis=0) if arrays else np.zeros(1)

"""What the models of both kinds of layers start from, and the times of their parts."""

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
    """A layer on a cluster.

    outer: placement of the P' = cp_size / head_size sequence shards.
    """

    shape: LayerShape
    cluster: Cluster
    rates: KernelRates
    cp_size: int
    options: Options
    outer: Placement

    @property
    def tokens(self) -> int:
        """T of each rank."""
        return self.outer.seq_len // self.cp_size

    @property
    def outer_cluster(self) -> Cluster:
        """The cluster as the ranks of one place see it: fewer of them in a node, each with its own links."""
        return replace(
            self.cluster, gpus_per_node=max(1, self.cluster.gpus_per_node // self.options.head_size)
        )

    def seconds(self, flops: FloatArray | float, rate: float) -> FloatArray | float:
        """Time of so many FLOPs (or bytes) at a rate."""
        return flops / (rate * self.cluster.compute_share)

    def evened(self, seconds: FloatArray) -> FloatArray:
        """[P'] what ranks that compute side by side take: sharing cores, one leaves its to the others."""
        return np.full_like(seconds, seconds.mean()) if self.cluster.compute_share < 1 else seconds

    def projections_s(self) -> float:
        """Query, key and value projections, forward."""
        return float(self.seconds(self.shape.qkv_flops(self.tokens), self.rates.projection_flops))

    def output_s(self) -> float:
        """Output projection, forward."""
        return float(self.seconds(self.shape.output_flops(self.tokens), self.rates.projection_flops))

    def overhead_s(self) -> float:
        """What no size explains, forward."""
        return self.rates.layer_overhead_s / self.cluster.compute_share

    def copy_s(self, num_bytes: FloatArray | float) -> FloatArray | float:
        """Packing, unpacking or adding rows."""
        return self.seconds(num_bytes, self.rates.copy_bytes)


@dataclass(slots=True)
class SchemeReport:
    """One scheme's layer.

    traffic: collectives by purpose (as CpComm.traffic names them), each in order; one layer call, forward and
    backward, [P] ranks. memory_bytes: largest buffers of the exchange beside a rank's own shard.
    """

    scheme: str
    forward: LayerTime
    backward: LayerTime
    traffic: dict[str, list[CollectiveCost]]
    memory_bytes: float
    chosen: Scheme | None = None

    @property
    def total(self) -> LayerTime:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def sent(self) -> FloatArray:
        """[P] bytes each rank sends in a layer, forward and backward."""
        return _sum([wire.sent for wires in self.traffic.values() for wire in wires])

    @property
    def received(self) -> FloatArray:
        """[P] bytes each rank receives."""
        return _sum([wire.received for wires in self.traffic.values() for wire in wires])

    @property
    def far(self) -> FloatArray:
        """[P] bytes each rank receives from other nodes."""
        return _sum([wire.far_received for wires in self.traffic.values() for wire in wires])


def _sum(arrays: list[FloatArray]) -> FloatArray:
    return np.sum(np.stack(arrays), axis=0) if arrays else np.zeros(1)

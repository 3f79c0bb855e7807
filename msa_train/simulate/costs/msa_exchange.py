"""Model each scheme of an MSA layer: the bytes it sends and when, as msa_train.parallel's sessions do it.

Names of collectives are those of `CpComm.traffic`. Symbols: P' ranks of the exchange, u places of a Ulysses
group; a row is one KV block (one block of one KV head), S = NL * M / u rows of a rank.

Bytes that a rank receives per layer, forward and backward, with K = bytes of a row and G of its gradient:

    all_gather              (P' - 1) * S * (2 K + G)      gathered again in the backward pass
    all_gather_all_reduce   (P' - 1) * S * (K + 2 G)      kept; an all-reduce moves its bytes twice
    ring                    (P' - 1) * S * 2 K + P' * S * fp32 G
    selected                f * (P' - 1) * S * K + its share of all requests * G

So an all-gather grows with the ranks, and `selected` only with what is selected. On 256 ranks with 16,384
tokens each (S = 512, K = 64 KiB, G = 96 KiB), an all-gather receives 255 * 512 * 224 KiB = 29.9 GB per layer
and rank.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from msa_train.simulate.costs import collective_cost
from msa_train.simulate.costs.collective_cost import CollectiveCost
from msa_train.simulate.costs.demand import Wants, requested_by_owner
from msa_train.simulate.costs.layer_costs import LayerCosts
from msa_train.simulate.costs.timeline import Mark, Timeline
from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.layer_shape import FP32_BYTES

FloatArray = NDArray[np.float64]


@dataclass(slots=True)
class PassWork:
    """Hold the seconds that each rank computes in one pass."""

    own: FloatArray
    "[P'] over the rank's own blocks, under which others travel"
    others: FloatArray
    "[P'] over blocks of other ranks"

    @property
    def total(self) -> FloatArray:
        """Return [P'] seconds over all blocks."""
        return self.own + self.others


@dataclass(slots=True)
class AttentionWork:
    """Hold the seconds that every rank computes in both passes."""

    forward: PassWork
    "forward attention"
    backward: PassWork
    "backward attention, KL loss included"

    @classmethod
    def divided(cls, forward_s: FloatArray, backward_s: FloatArray, own: FloatArray) -> "AttentionWork":
        """Divide [P'] seconds of each pass: the share `own` [P'] needs own blocks only.

        Example: forward [4, 8], own [1, 0.25] -> forward own [4, 2], others [0, 6].
        """
        forward, backward = (PassWork(x * own, x * (1 - own)) for x in (forward_s, backward_s))
        return cls(forward, backward)


@dataclass(slots=True)
class Exchange(ABC):
    """Model one scheme: fill in traffic and memory once, then move the clocks of a pass."""

    setup: LayerCosts
    "the layer on its cluster"
    wants: Wants
    "requests of all ranks"
    work: AttentionWork
    "seconds of attention"
    traffic: dict[str, list[CollectiveCost]] = field(default_factory=dict)
    "collectives of u * P' ranks in bytes, by purpose, in order"
    memory_bytes: float = 0.0
    "largest buffers, bytes of the rank that has most"

    @property
    def cluster(self) -> Cluster:
        """Return the cluster as the ranks of one place see it."""
        return self.setup.outer_cluster

    @property
    def size(self) -> int:
        """Return P', ranks of the exchange."""
        return self.setup.outer.cp_size

    @property
    def overlap(self) -> bool:
        """Tell if collectives run under computing."""
        return self.setup.options.overlap

    @property
    def kv_blocks_per_shard(self) -> int:
        """Return S, KV blocks that a rank owns: NL * M / u."""
        return self.setup.outer.order.shape[1] * self.wants.num_kv_heads

    @abstractmethod
    def plan(self) -> None:
        """Fill in traffic and memory."""

    def before_selection(self, clocks: Timeline) -> None:  # noqa: B027
        """Move the clocks where projections are done and nothing is selected yet."""

    def select(self, clocks: Timeline, scoring: FloatArray, moves: tuple[float, float]) -> None:
        """Move the clocks through scoring.

        Args:
            clocks: of all ranks.
            scoring: [P'] seconds of scoring and top-k.
            moves: seconds in which index queries go to who scores them, and block ids come back.
        """
        clocks.collective("index_query", moves[0])
        clocks.compute(scoring)
        clocks.collective("index_query", moves[1])

    @abstractmethod
    def forward(self, clocks: Timeline, *, again: bool) -> None:
        """Move the clocks from the selection to the attention's output; again: in a recomputation."""

    def before_backward(self, clocks: Timeline) -> None:  # noqa: B027
        """Move the clocks where the output's gradient arrives."""

    @abstractmethod
    def backward(self, clocks: Timeline) -> None:
        """Move the clocks from the gradient of the attention's output to those of q, k, v."""

    def everywhere(self, wire: CollectiveCost) -> CollectiveCost:
        """Repeat a collective of P' ranks for each of the u places."""
        return collective_cost.side_by_side([wire] * self.setup.options.head_size)

    def fullest(self, values: FloatArray) -> FloatArray:
        """Take the fullest place: [u * P'] -> [P']; example: u = 2, [1, 5, 3, 2] -> [3, 5]."""
        return values.reshape(-1, self.size).max(axis=0)

    def took(self, name: str, wire: CollectiveCost) -> None:
        """Note a collective."""
        self.traffic.setdefault(name, []).append(wire)

    def seconds(self, name: str) -> float:
        """Return the seconds of all collectives of a purpose, one after another."""
        return sum(wire.time_s(self.cluster) for wire in self.traffic.get(name, []))


@dataclass(slots=True)
class AllGather(Exchange):
    """Gather all KV blocks, in the backward pass again; the gather runs under attention over own blocks."""

    early: bool = False
    "start before index scoring instead, which nothing prevents: a gather waits for no selection"
    _started: Mark = field(init=False)

    def plan(self) -> None:
        """See Exchange.plan."""
        shape = self.setup.shape
        shard = self.kv_blocks_per_shard * shape.kv_block_bytes
        # added on the way, so in fp32 there too
        grads = self.kv_blocks_per_shard * shape.kv_block_added_bytes
        gather = self.everywhere(collective_cost.all_gather(shard, self.size, self.cluster))
        self.took("kv", gather)
        self.took("kv_again", gather)
        self.took("kv_grad", self.everywhere(collective_cost.reduce_scatter(grads, self.size, self.cluster)))
        # gathered rows and gradients of all rows, which leave from where they were computed
        self.memory_bytes = self.size * (shard + grads)

    def before_selection(self, clocks: Timeline) -> None:
        """See Exchange.before_selection."""
        self._started = clocks.start()

    def forward(self, clocks: Timeline, *, again: bool) -> None:
        """See Exchange.forward."""
        self._gather(clocks, "kv", self.work.forward.own)
        clocks.compute(self.work.forward.others)

    def before_backward(self, clocks: Timeline) -> None:
        """See Exchange.before_backward."""
        self._started = clocks.start()

    def backward(self, clocks: Timeline) -> None:
        """See Exchange.backward."""
        self._gather(clocks, "kv_again", self.work.backward.own)
        # a reduce-scatter needs the gradients of all blocks, so nothing is left to compute under it
        clocks.compute(self.work.backward.others)
        clocks.collective("kv_grad", self.seconds("kv_grad"))

    def _gather(self, clocks: Timeline, name: str, own: FloatArray) -> None:
        if not self.early:
            clocks.under(name, self.seconds(name), own, overlap=self.overlap)
            return
        clocks.compute(own)
        clocks.finish(name, self._started, self.seconds(name))


@dataclass(slots=True)
class AllGatherAllReduce(Exchange):
    """Gather once and keep, as the nearest rival does; all ranks get the sum of gradients; no overlap.

    The rival adds in the dtype of the keys.
    """

    def plan(self) -> None:
        """See Exchange.plan."""
        shape = self.setup.shape
        shard, grads = (
            self.kv_blocks_per_shard * shape.kv_block_bytes,
            self.kv_blocks_per_shard * shape.kv_block_grad_bytes,
        )
        self.took("kv", self.everywhere(collective_cost.all_gather(shard, self.size, self.cluster)))
        self.took("kv_grad", self.everywhere(collective_cost.all_reduce(grads, self.size, self.cluster)))
        # as in AllGather: gathered rows, their gradients in fp32 and on the wire
        self.memory_bytes = self.size * (shard + (1 + FP32_BYTES / shape.element_bytes) * grads)

    def forward(self, clocks: Timeline, *, again: bool) -> None:
        """See Exchange.forward."""
        clocks.collective("kv", self.seconds("kv"))
        clocks.compute(self.work.forward.total)

    def backward(self, clocks: Timeline) -> None:
        """See Exchange.backward."""
        clocks.compute(self.work.backward.total)
        clocks.collective("kv_grad", self.seconds("kv_grad"))


@dataclass(slots=True)
class Ring(Exchange):
    """Pass shards round, one arrives while a rank works on another; going back, gradients go along."""

    step: CollectiveCost = field(init=False)
    "one shift of a shard of keys and values, bytes"
    grad_step: CollectiveCost = field(init=False)
    "one shift of its gradients in fp32, bytes"

    def plan(self) -> None:
        """See Exchange.plan."""
        shape = self.setup.shape
        shard = self.kv_blocks_per_shard * shape.kv_block_bytes
        # sums on their way stay in fp32
        grads = self.kv_blocks_per_shard * shape.kv_block_added_bytes
        self.step = self.everywhere(collective_cost.shift(shard, self.size, self.cluster))
        self.grad_step = self.everywhere(collective_cost.shift(grads, self.size, self.cluster))
        # keys and values visit P' - 1 ranks, gradients make the whole round and come home
        if self.size > 1:
            self.took("kv", self.step.scaled(self.size - 1))
            self.took("kv_again", self.step.scaled(self.size - 1))
            self.took("kv_grad", self.grad_step.scaled(self.size))
        # a shard on its way, and up to three gradients of a shard in fp32
        self.memory_bytes = shard + 3 * grads

    def _steps(self, work: PassWork) -> list[FloatArray]:
        """List the [P'] seconds of each of P' steps: own shard first, others by KV blocks wanted from each.

        Example: a rank of 4 with 6 s over others, which wants 1, 2 and 0 blocks of them -> 2, 4 and 0 s.
        """
        rows = requested_by_owner(self.wants).astype(float)
        rows /= np.maximum(rows.sum(axis=1, keepdims=True), 1)
        rank, numbers = np.arange(self.size), range(1, self.size)
        others = (work.others * rows[rank, (rank - number) % self.size] for number in numbers)
        return [self.setup.evened(seconds) for seconds in (work.own, *others)]

    def forward(self, clocks: Timeline, *, again: bool) -> None:
        """See Exchange.forward."""
        for number, seconds in enumerate(self._steps(self.work.forward)):
            self._step(clocks, "kv", seconds, self.step.time_s(self.cluster) * (number < self.size - 1))

    def backward(self, clocks: Timeline) -> None:
        """See Exchange.backward."""
        step_s, grad_s = self.step.time_s(self.cluster), self.grad_step.time_s(self.cluster)
        for number, seconds in enumerate(self._steps(self.work.backward)):
            # gradients of the piece before travel beside the next piece
            self._step(clocks, "kv_again", seconds, step_s * (number < self.size - 1) + grad_s * (number > 0))
        # the last shift brings every shard's gradient home, with nothing left to compute
        if self.size > 1:
            clocks.neighbours("kv_grad", np.zeros(self.size), grad_s)

    def _step(self, clocks: Timeline, name: str, seconds: FloatArray, wire_s: float) -> None:
        if wire_s == 0:
            clocks.compute(seconds)
        elif self.overlap:
            clocks.neighbours(name, seconds, wire_s)
        else:
            clocks.neighbours(name, np.zeros_like(seconds), wire_s)
            clocks.compute(seconds)

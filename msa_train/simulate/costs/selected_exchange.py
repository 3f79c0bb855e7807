"""Model an exchange of selected KV blocks, in one piece or in slices of queries that hide it under scoring.

In slices (`Options.query_slices`): as soon as a slice of queries has selected, its block ids return to the
ranks that hold the queries, and requests and rows travel while the next slice is scored. A KV block travels
once, with the first slice that wants it. The gradients return all together.

The links serve what is sent in the background one after the other, in the order of sending.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from msa_train.parallel.kv_exchange.cost_model import OWN_BEFORE
from msa_train.simulate.costs import collective_cost
from msa_train.simulate.costs.collective_cost import CollectiveCost
from msa_train.simulate.costs.demand import Hops, exchange_rows, sliced_rows
from msa_train.simulate.costs.hot_blocks import HotWires, hot_wires
from msa_train.simulate.costs.msa_exchange import Exchange
from msa_train.simulate.costs.timeline import Among, Mark, Timeline
from msa_train.simulate.inputs.layer_shape import FP32_BYTES

FloatArray = NDArray[np.float64]
REQUEST_HEADER_BYTES = 64
"bytes of a request beside its bitmaps"
NETWORK_LINK, NODE_LINK = "network", "node"


@dataclass(slots=True)
class Selected(Exchange):
    """Fetch requested KV blocks from their owners, flat or by node; the first hop is hidden by own blocks."""

    hierarchical: bool = False
    "over the network once per node, then inside"
    hot: HotWires = field(init=False)
    "collectives of broadcast blocks"
    sent: FloatArray = field(init=False)
    "[P'] rows that a rank packs, broadcast ones included, fullest place"
    fetched: FloatArray = field(init=False)
    "[P'] rows that a rank holds afterwards, broadcast ones included, fullest place"
    slices: "list[_Slice]" = field(default_factory=list)
    "of the forward pass; empty in one piece"
    _there: list[tuple[str, Mark]] = field(default_factory=list)
    "what is on its way: purpose, and when it is there"

    def plan(self) -> None:
        """See Exchange.plan."""
        shape, options = self.setup.shape, self.setup.options
        rows = exchange_rows(
            self.wants, self.cluster, hierarchical=self.hierarchical, hot_share=options.hot_share
        )
        # each rank sends its bitmaps for all P' owners to all: P'^2 * W bytes are in the gathered request
        request = REQUEST_HEADER_BYTES + self.size * self.wants.bitmap_bytes
        asked = self.everywhere(collective_cost.all_gather(request, self.size, self.cluster))
        # gradients take the same way back, with the index keys' gradient in each row
        for name, hop in zip(self._hop_names("kv_grad"), rows.hops, strict=True):
            self.took(name, hop.reversed().scaled(shape.kv_block_grad_bytes))
        node_size = self.cluster.gpus_per_node if self.hierarchical else self.size
        self.hot = hot_wires(rows.hot, shape, self.cluster, node_size)
        for wire in self.hot.backward:
            self.took("kv_grad_hot", wire)
        parts = [rows]
        if options.query_slices > 1:
            parts = sliced_rows(
                self.wants,
                self.cluster,
                hierarchical=self.hierarchical,
                hot_share=options.hot_share,
                slices=options.query_slices,
            )
        for part in parts:
            self._plan_slice(part, asked, node_size)
        if not options.keep_for_backward:
            for name in [name for name in self.traffic if name.startswith("kv") and "grad" not in name]:
                self.traffic[name.replace("kv", "kv_again", 1)] = list(self.traffic[name])
        # what is packed for the first hop, own broadcast blocks included; what is unpacked after the last one
        self.sent = self.fullest(rows.hops[0].sent + rows.hot.flatten())
        self.fetched = self.fullest(rows.fetched + rows.hot.sum(axis=1).repeat(self.size))
        self._count_memory(rows.hops, request)

    def _hop_names(self, purpose: str) -> list[str]:
        return [f"{purpose}_outer", purpose] if self.hierarchical else [purpose]

    def _plan_slice(self, rows: Hops, asked: CollectiveCost, node_size: int) -> None:
        """Note the collectives of the forward pass that one slice of queries brings about."""
        shape = self.setup.shape
        hops = [hop.scaled(shape.kv_block_bytes) for hop in rows.hops]
        hot = hot_wires(rows.hot, shape, self.cluster, node_size)
        self.took("request", asked)
        for name, hop in zip(self._hop_names("kv"), hops, strict=True):
            self.took(name, hop)
        for wire in hot.forward:
            self.took("kv_hot", wire)
        if self.setup.options.query_slices > 1:
            seconds = [hop.time_s(self.cluster) for hop in hops]
            self.slices.append(
                _Slice(asked.time_s(self.cluster), seconds, sum(hot.seconds(hot.forward, self.cluster)))
            )

    def _count_memory(self, hops: list[CollectiveCost], request: float) -> None:
        """Add the larger of two moments, in bytes.

        Forward: requests, rows to send, rows in transit on the node's middle rank, fetched rows. Backward:
        fetched rows with their gradients in fp32 and once more in the wire's type, and gradients that arrive.
        """
        shape = self.setup.shape
        # in a hierarchical exchange a rank receives rows for its whole node before they are handed on
        transit = self.fullest(hops[0].received) if len(hops) == 2 else np.zeros(self.size)
        # slices arrive one by one, and are joined in the order of the whole exchange
        copies = 2 if self.slices else 1
        forward = (self.sent + transit + copies * self.fetched) * shape.kv_block_bytes
        # a gradient exists twice: summed in fp32 while it is computed, and in the wire's type when it leaves
        wide = 1 + FP32_BYTES / shape.element_bytes
        backward = self.fetched * (shape.kv_block_bytes + wide * shape.kv_block_grad_bytes)
        backward = backward + (self.sent + transit) * shape.kv_block_grad_bytes
        self.memory_bytes = float(np.maximum(forward + self.size * request, backward).max())

    @property
    def _first_among(self) -> Among:
        """Return who takes part in what crosses the network; broadcast blocks make it everyone's."""
        return Among.place if self.hierarchical and not self.hot.forward else Among.everyone

    def select(self, clocks: Timeline, scoring: FloatArray, moves: tuple[float, float]) -> None:
        """See Exchange.select; in slices everything but the last one's rows is sent meanwhile."""
        if not self.slices:
            Exchange.select(self, clocks, scoring, moves)
            return
        clocks.collective("index_query", moves[0])
        for part in self.slices:
            clocks.compute(scoring / len(self.slices))
            there = clocks.send("index_query", clocks.start(), moves[1] / len(self.slices), NETWORK_LINK)
            there = clocks.send("request", there, part.request_s + self.cluster.host_sync_s, NETWORK_LINK)
            if part.hot_s:
                self._there.append(("kv_hot", clocks.send("kv_hot", there, part.hot_s, NETWORK_LINK)))
            ways = [
                (NETWORK_LINK, Among.place if self.hierarchical else Among.everyone),
                (NODE_LINK, Among.node),
            ]
            for name, seconds, (link, among) in zip(self._hop_names("kv"), part.hops_s, ways, strict=False):
                there = clocks.send(name, there, seconds, link, among)
            self._there.append(("kv", there))
            if not self.overlap:
                self._wait(clocks)

    def _wait(self, clocks: Timeline) -> None:
        for name, there in self._there:
            clocks.wait(name, there)
        self._there.clear()

    def forward(self, clocks: Timeline, *, again: bool) -> None:
        """See Exchange.forward."""
        if self.slices and not again:
            # packing shares the device with scoring: it takes its time, and delays nobody
            clocks.copy(self.setup.copy_s(self.sent * self.setup.shape.kv_block_bytes))
            clocks.compute(self.work.forward.own)
            self._wait(clocks)
            # the slices' rows go to their places in one pool
            clocks.copy(self.setup.copy_s(self.fetched * self.setup.shape.kv_block_bytes))
        else:
            if not again:
                # the host must see the requests before it can launch sends of the right sizes
                clocks.collective("request", self.seconds("request") + self.cluster.host_sync_s)
            self._fetch(clocks, "kv", self.work.forward.own)
        clocks.compute(self.work.forward.others)

    def _fetch(self, clocks: Timeline, purpose: str, computing: FloatArray) -> None:
        """Fetch in both hops and broadcast; only what starts at once is hidden under `computing`."""
        scatter_s, gather_s = self.hot.seconds(self.hot.forward, self.cluster)
        # owners gather the rows into one buffer before anything can leave
        clocks.copy(self.setup.copy_s(self.sent * self.setup.shape.kv_block_bytes))
        first = f"{purpose}_outer" if self.hierarchical else purpose
        clocks.under(
            first, self.seconds(first) + scatter_s, computing, self._first_among, overlap=self.overlap
        )
        if self.hierarchical:
            # the second hop waits for the whole first one, and own blocks are done by then
            clocks.collective(purpose, self.seconds(purpose), Among.node)
        if self.hot.forward:
            clocks.collective(f"{purpose}_hot", gather_s)

    def backward(self, clocks: Timeline) -> None:
        """See Exchange.backward."""
        own, shape = self.work.backward.own, self.setup.shape
        keep = self.setup.options.keep_for_backward
        if not keep:
            self._fetch(clocks, "kv_again", own)
        # gradients of others' blocks come first, so that they can travel under those of own blocks
        clocks.compute(self.work.backward.others)
        clocks.copy(self.setup.copy_s(self.fetched * shape.kv_block_grad_bytes))
        first = "kv_grad"
        scatter_s, home_s = self.hot.seconds(self.hot.backward, self.cluster)
        # own blocks come last where rows were kept, and hide the way back; fetched again, they hid that
        computing = own if keep else 0 * own
        if self.hierarchical:
            first = "kv_grad_outer"
            before = computing * OWN_BEFORE
            computing = computing - before
            clocks.under("kv_grad", self.seconds("kv_grad"), before, Among.node, overlap=self.overlap)
        clocks.under(
            first, self.seconds(first) + scatter_s, computing, self._first_among, overlap=self.overlap
        )
        if self.hot.backward:
            clocks.collective("kv_grad_hot", home_s)
        # owners add what arrives to their own gradients
        clocks.copy(self.setup.copy_s(self.sent * shape.kv_block_grad_bytes))


@dataclass(slots=True)
class _Slice:
    """Hold the seconds of one slice's collectives in the forward pass."""

    request_s: float
    "of its request"
    hops_s: list[float]
    "of its rows, by hop"
    hot_s: float
    "of its broadcast blocks"

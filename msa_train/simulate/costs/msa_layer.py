"""Time one MSA layer under each scheme: its collectives, its clocks, its memory.

Forward: index keys travel under the query, key and value projections; scoring and top-k; then the exchange
(`msa_exchange`); output projection. Backward: the same the other way round. Index keys have no backward
exchange of their own: their gradients travel with those of the KV blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msa_train.parallel.comm.link_rates import ExchangeRates, Line, fit_line
from msa_train.parallel.kv_exchange.cost_model import (
    SELECTED_PAYS,
    KvBlockBytes,
    all_gather_cost,
    selected_cost,
)
from msa_train.simulate.costs import collective_cost
from msa_train.simulate.costs.collective_cost import CollectiveCost
from msa_train.simulate.costs.demand import Wants, exchange_rows, exchange_shape
from msa_train.simulate.costs.layer_costs import LayerCosts, SchemeReport
from msa_train.simulate.costs.msa_exchange import (
    AllGather,
    AllGatherAllReduce,
    AttentionWork,
    Exchange,
    Ring,
)
from msa_train.simulate.costs.selected_exchange import NODE_LINK, Selected
from msa_train.simulate.costs.timeline import LayerTime, Mark, Timeline
from msa_train.simulate.inputs.cluster import Cluster
from msa_train.simulate.inputs.layer_shape import BACKWARD_FACTOR
from msa_train.simulate.inputs.scenario import Scheme

FloatArray = NDArray[np.float64]
BLOCK_ID_BYTES = 4
"int32"


@dataclass(slots=True)
class MsaWork:
    """Hold what a layer's queries ask for."""

    tiles: NDArray[np.int64]
    "[P'] (query, block) pairs that the queries of a rank select for one KV head"
    wants: Wants
    "requests of all ranks"
    local_share: FloatArray
    "[P'] share of the (query, block) pairs whose block is local, 0 to 1"
    index_scores: NDArray[np.int64]
    "[P'] (query, block) pairs that each rank scores"
    index_moved: NDArray[np.int64]
    "[P', P'] tokens whose index queries change ranks for equal scoring, by receiving and holding rank"


class MsaLayer:
    """Find times and bytes of one layer call, forward and backward, for every scheme."""

    def __init__(
        self,
        setup: LayerCosts,
        work: MsaWork,
        *,
        attention: AttentionWork | None = None,
        with_projections: bool = True,
    ) -> None:
        """Time attention and index scoring.

        Args:
            setup: the layer on its cluster.
            work: what its queries ask for.
            attention: seconds of attention where they were measured; None: by the kernels' rates.
            with_projections: False leaves the attention alone, as the wire benchmark measures it.
        """
        self.setup, self.work, self.with_projections = setup, work, with_projections
        self.head_size, self.outer_size = setup.options.head_size, setup.outer.cp_size
        self.cluster = setup.outer_cluster
        shape, rates = setup.shape, setup.rates
        self.attention = attention or self._by_rates()
        # every key of a block is scored before its maximum is taken; a rank scores M / u of the M KV heads
        index = shape.index_flops(work.index_scores.astype(np.float64) * shape.block_size) / self.head_size
        self.index_s = np.asarray(setup.seconds(index, rates.index_flops))
        projection = shape.index_projection_flops(setup.tokens)
        self.index_projection_s = float(setup.seconds(projection, rates.projection_flops))

    def _by_rates(self) -> AttentionWork:
        """Return the seconds of attention by FLOPs and kernel rates."""
        setup, shape, rates = self.setup, self.setup.shape, self.setup.rates
        tiles = self.work.tiles.astype(np.float64)
        # a rank of a Ulysses group has 1 / u of the heads and u times the queries, which `tiles` counts
        flops = shape.sparse_flops(tiles) / self.head_size
        backward_s = setup.seconds(BACKWARD_FACTOR * flops, rates.sparse_backward_flops)
        if shape.trains_index:
            # the KL loss is computed in the backward pass, which has the main branch's logits once more
            backward_s = backward_s + setup.seconds(shape.kl_flops(tiles) / self.head_size, rates.kl_flops)
        forward_s = setup.seconds(flops, rates.sparse_forward_flops)
        return AttentionWork.divided(np.asarray(forward_s), np.asarray(backward_s), self.work.local_share)

    def report(self, scheme: Scheme) -> SchemeReport:
        """Time one scheme: forward, backward, and the collectives of both."""
        if scheme is Scheme.auto:
            costs = self._costs()
            best = min(costs, key=lambda name: costs[name])
            if self.setup.options.query_slices > 1:
                return self._report_later_auto(best)
            return self.report_auto(selected=best is not Scheme.all_gather_early)
        exchange = self._exchange(scheme)
        forward, backward = self._forward(exchange, again=False), self._backward(exchange)
        # index keys have no gradient collective: their gradients are part of each KV block's row
        traffic = {"index_key": [self._index_keys()], **exchange.traffic}
        if self.work.index_moved.any():
            traffic["index_query"] = list(self._index_moves())
        if self.setup.options.recompute:
            # selection and requests are replayed, so index queries and requests do not travel again
            backward = self._forward(exchange, again=True) + backward
            for name in ("index_key", "kv", "kv_outer", "kv_hot"):
                if name in traffic:
                    traffic[name] = traffic[name] * 2
        return SchemeReport(
            scheme.value,
            forward,
            backward,
            self._with_inner(traffic),
            # every rank keeps all index keys of the pack, whatever the scheme
            exchange.memory_bytes + self._index_bytes(),
        )

    def _exchange(self, scheme: Scheme) -> Exchange:
        """Return the model of a scheme, with its traffic filled in."""
        parts = self.setup, self.work.wants, self.attention
        exchange: Exchange
        if scheme in (Scheme.selected, Scheme.selected_hierarchical):
            # one node, or nodes of one rank: the exchange is flat then, whatever was asked for
            several = 1 < self.cluster.num_nodes(self.outer_size) < self.outer_size
            exchange = Selected(*parts, hierarchical=several and scheme is Scheme.selected_hierarchical)
        elif scheme is Scheme.ring:
            exchange = Ring(*parts)
        elif scheme is Scheme.all_gather_all_reduce:
            exchange = AllGatherAllReduce(*parts)
        else:
            exchange = AllGather(*parts, early=scheme is Scheme.all_gather_early)
        exchange.plan()
        return exchange

    def report_auto(self, *, selected: bool) -> SchemeReport:
        """Time `auto` where it found selected KV blocks cheaper, or an all-gather."""
        chosen = Scheme.selected_hierarchical if selected else Scheme.all_gather
        report = self.report(chosen)
        if not selected:
            # the request that decided is paid for all the same
            asked = self._exchange(Scheme.selected_hierarchical)
            clocks = self._clocks()
            clocks.collective("request", asked.seconds("request") + self.cluster.host_sync_s)
            report.forward = report.forward + clocks.result()
            report.traffic["request"] = asked.traffic["request"]
        report.scheme, report.chosen = Scheme.auto.value, chosen
        return report

    def _report_later_auto(self, chosen: Scheme) -> SchemeReport:
        """Time `auto` as it goes from a layer's second call on: it has chosen by the call before."""
        report = self.report(chosen)
        if chosen is Scheme.all_gather_early:
            # asked all the same, for the next call's choice: it travels under attention, and nobody waits
            report.traffic["request"] = self._exchange(Scheme.selected).traffic["request"][:1]
        report.scheme, report.chosen = Scheme.auto.value, chosen
        return report

    def _costs(self) -> dict[Scheme, float]:
        """Apply the exchange's own rule to rates as it would measure them on this cluster: seconds."""
        hierarchical = 1 < self.cluster.num_nodes(self.outer_size) < self.outer_size
        setup, wants, rates = self.setup, self.work.wants, measured_rates(self.cluster, self.outer_size)
        options = setup.options
        block = setup.shape
        size = KvBlockBytes(block.kv_block_bytes, block.kv_block_grad_bytes, block.kv_block_added_bytes)
        # in one piece nothing of the call is known before it, and `auto` knows of nodes or does not
        later = options.query_slices > 1
        ways = {Scheme.selected_hierarchical: True} if hierarchical else {Scheme.selected: False}
        if later:
            ways[Scheme.selected] = False
        costs: dict[Scheme, float] = {}
        for scheme, by_node in ways.items():
            rows = exchange_rows(wants, self.cluster, hierarchical=by_node, hot_share=options.hot_share)
            shape = exchange_shape(wants, self.cluster, hierarchical=by_node, hot_share=0.0)
            # per hop, rows of the rank that sends or receives most: all others wait for it
            busiest = [int(max(hop.sent.max(), hop.received.max())) for hop in rows.hops]
            # the rule knows one exchange; of several places of a Ulysses group the fullest counts
            num_hot = int(rows.hot.sum(axis=1).max())
            costs[scheme] = selected_cost(
                shape,
                busiest,
                num_hot,
                size,
                rates,
                fetches=1 if options.keep_for_backward else 2,
            )
        shape = exchange_shape(wants, self.cluster, hierarchical=False, hot_share=0.0)
        gathered = all_gather_cost(shape, size, rates)
        costs[Scheme.all_gather_early] = gathered * SELECTED_PAYS if later else gathered
        return costs

    def _forward(self, exchange: Exchange, *, again: bool) -> LayerTime:
        """Move the clocks through a forward pass; again: in a recomputation, without scoring."""
        setup, clocks = self.setup, self._clocks()
        keys = self._index_keys().time_s(self.setup.cluster)
        clocks.compute(setup.overhead_s())
        started = clocks.start()
        if not setup.options.overlap:
            clocks.finish("index_key", started, keys)
        # index keys and queries travel while queries, keys and values are projected
        index_heads = self._send_heads(clocks, self._inner_bytes_index())
        clocks.compute(self._projections_s())
        self._wait_heads(clocks, index_heads)
        # these are wanted after the scoring only
        heads = self._send_heads(clocks, self._inner_bytes_in() - self._inner_bytes_index())
        if setup.options.overlap:
            clocks.finish("index_key", started, keys)
        exchange.before_selection(clocks)
        if not again:
            there, back = (wire.time_s(self.cluster) for wire in self._index_moves())
            exchange.select(clocks, self.index_s, (there, back))
        self._wait_heads(clocks, heads)
        exchange.forward(clocks, again=again)
        self._switch_heads(clocks, self._inner_bytes_out())
        clocks.compute(self._output_s())
        return clocks.result()

    def _backward(self, exchange: Exchange) -> LayerTime:
        """Move the clocks through a backward pass; a projection has two products there."""
        clocks = self._clocks()
        exchange.before_backward(clocks)
        clocks.compute(2 * self._output_s())
        self._switch_heads(clocks, self._inner_bytes_out())
        exchange.backward(clocks)
        self._switch_heads(clocks, self._inner_bytes_in())
        clocks.compute(2 * self._projections_s())
        return clocks.result()

    def _projections_s(self) -> float:
        return (self.setup.projections_s() + self.index_projection_s) * self.with_projections

    def _output_s(self) -> float:
        return self.setup.output_s() * self.with_projections

    def _clocks(self) -> Timeline:
        return Timeline(self.outer_size, self.outer_size // self.cluster.num_nodes(self.outer_size))

    def _index_keys(self) -> CollectiveCost:
        """Gather all index keys on every rank, in Ulysses groups or not: T * index_head_dim elements each."""
        shard = self.setup.tokens * self.setup.shape.index_token_bytes
        return collective_cost.all_gather(shard, self.setup.cp_size, self.setup.cluster)

    def _index_moves(self) -> tuple[CollectiveCost, CollectiveCost]:
        """Move index queries to the ranks that score them, and block ids (int32) back."""
        shape = self.setup.shape
        query = shape.num_kv_heads * shape.index_head_dim * shape.element_bytes / self.head_size
        ids = shape.num_kv_heads * shape.topk * BLOCK_ID_BYTES / self.head_size
        there = collective_cost.all_to_all(self.work.index_moved, query, self.cluster)
        back = collective_cost.all_to_all(self.work.index_moved.T, ids, self.cluster)
        return tuple(collective_cost.side_by_side([wire] * self.head_size) for wire in (there, back))  # type: ignore[return-value]

    def _index_bytes(self) -> float:
        return float(self.setup.outer.seq_len * self.setup.shape.index_token_bytes)

    def _inner_bytes_in(self) -> float:
        """Return the bytes of q, k, v and index queries that a rank sends in its Ulysses group."""
        shape, heads = self.setup.shape, self.setup.shape.num_heads + 2 * self.setup.shape.num_kv_heads
        each = heads * shape.head_dim + shape.num_kv_heads * shape.index_head_dim
        return self._inner_share() * each * shape.element_bytes

    def _inner_bytes_index(self) -> float:
        """Return the bytes of index queries alone."""
        shape = self.setup.shape
        return self._inner_share() * shape.num_kv_heads * shape.index_head_dim * shape.element_bytes

    def _inner_bytes_out(self) -> float:
        """Return the bytes of outputs that a rank sends back to the ranks of their tokens."""
        shape = self.setup.shape
        return self._inner_share() * shape.num_heads * shape.head_dim * shape.element_bytes

    def _inner_share(self) -> float:
        # of T tokens, the heads of the u - 1 other ranks leave: T * (u - 1) / u tokens with all their heads
        return self.setup.tokens * (self.head_size - 1) / self.head_size

    def _inner(self, num_bytes: float) -> CollectiveCost:
        """Return an all-to-all of each Ulysses group, in which each rank sends and receives so many bytes."""
        each, none = np.full(self.setup.cp_size, num_bytes), np.zeros(self.setup.cp_size)
        if self.head_size <= self.setup.cluster.gpus_per_node:
            return CollectiveCost(each, each, none, none, intra_node_steps=1)
        return CollectiveCost(none, none, each, each, inter_node_steps=1)

    def _send_heads(self, clocks: Timeline, num_bytes: float) -> Mark | None:
        """Trade in the background; None without Ulysses groups."""
        if self.head_size == 1:
            return None
        there = clocks.send(
            "heads", clocks.start(), self._inner(num_bytes).time_s(self.setup.cluster), NODE_LINK
        )
        if not self.setup.options.overlap:
            clocks.wait("heads", there)
        return there

    def _wait_heads(self, clocks: Timeline, there: Mark | None) -> None:
        if there is not None:
            clocks.wait("heads", there)

    def _switch_heads(self, clocks: Timeline, num_bytes: float) -> None:
        if self.head_size > 1:
            clocks.collective("heads", self._inner(num_bytes).time_s(self.setup.cluster))

    def _with_inner(self, traffic: dict[str, list[CollectiveCost]]) -> dict[str, list[CollectiveCost]]:
        if self.head_size == 1:
            return traffic
        # once in and once out per pass, and once more each in a recomputation
        passes = 2 + self.setup.options.recompute
        inner = [self._inner(self._inner_bytes_in()), self._inner(self._inner_bytes_out())]
        return {**traffic, "heads": inner * passes}


def measured_rates(cluster: Cluster, cp_size: int) -> ExchangeRates:
    """Time equal collectives on this cluster, a short one and a long one of each kind, and fit lines.

    Example: 4 ranks, 2 per node, 10 and 5 bytes/s, latencies 1 and 2 s -> inner 1 s + 0.1 s per byte, outer 2
    s + 0.2 s, all-to-all (2 of 3 bytes inter-node) 3 s + 0.133 s, all-gather on rails 3 s + 0.067 s.
    """
    nodes = cluster.num_nodes(cp_size)
    # two sizes give a line exactly, as the model's times are lines: 4 KiB for latency, 4 MiB for the rate
    node_size, sizes = cp_size // nodes, (2.0**12, 2.0**22)

    def line(move: Callable[[float], CollectiveCost]) -> Line:
        """Fit a line; move: returns a collective in which each rank sends so many bytes."""
        return fit_line(sizes, [move(num_bytes).time_s(cluster) for num_bytes in sizes])

    def exchange(num_bytes: float, mates: NDArray[np.bool_]) -> CollectiveCost:
        # each rank sends num_bytes in equal parts to its mates, itself left out
        return collective_cost.all_to_all(mates * (num_bytes / max(1, mates[0].sum() - 1)), 1.0, cluster)

    rank, others = np.arange(cp_size), max(1, cp_size - 1)
    node, place = rank // node_size, rank % node_size
    return ExchangeRates(
        all_to_all=line(lambda n: exchange(n, np.ones((cp_size, cp_size), dtype=bool))),
        all_gather=line(lambda n: collective_cost.all_gather(n / others, cp_size, cluster)),
        reduce_scatter=line(lambda n: collective_cost.reduce_scatter(n / others, cp_size, cluster)),
        inner=line(lambda n: exchange(n, node[:, None] == node)),
        outer=line(lambda n: exchange(n, place[:, None] == place)),
    )

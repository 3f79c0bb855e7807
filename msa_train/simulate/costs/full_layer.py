"""Time one full-attention layer: keys and values by ring, gather or on demand; queries may move.

Cost: a scheme's parts are a [P, P] table, found in P passes over the U = seq_len / 32 units of queries
(blocks are multiples of 32 tokens): 256 passes over 131,072 numbers for 4M tokens on 256 ranks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msa_train.simulate.costs import collective_cost
from msa_train.simulate.costs.collective_cost import CollectiveCost
from msa_train.simulate.costs.layer_costs import LayerCosts, SchemeReport
from msa_train.simulate.costs.timeline import LayerTime, Timeline
from msa_train.simulate.inputs.layer_shape import BACKWARD_FACTOR, FP32_BYTES
from msa_train.simulate.inputs.layouts import Share, moves, owners, share_full
from msa_train.simulate.inputs.scenario import FullScheme

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
_RINGS = (FullScheme.ring, FullScheme.ring_unbalanced)


@dataclass(slots=True)
class _Parts:
    """Hold who computes and who holds what."""

    share: Share
    "who computes the queries"
    key_owner: IntArray
    "[U] int64, rank that holds the keys of each unit"
    pairs: FloatArray
    "[P, P] float64, causal (query, key) pairs by who computes the query and who holds the key"


class FullLayer:
    """Find times and bytes of one layer call, forward and backward, for every scheme.

    Args:
        setup: the layer on its cluster, without Ulysses groups.
    """

    def __init__(self, setup: LayerCosts) -> None:
        self.setup, self.cluster, self.cp_size = setup, setup.cluster, setup.cp_size
        self.shard_bytes = float(setup.tokens * setup.shape.kv_token_bytes)
        self._known: dict[tuple[bool, bool], _Parts] = {}

    def report(self, scheme: FullScheme) -> SchemeReport:
        """Time one scheme: forward, backward, and the collectives of both.

        Forward: projections, queries move, attention with its exchange, outputs return, output projection.
        Backward: the same the other way round; a projection has two products there (input and weight).
        """
        setup, parts = self.setup, self._parts(scheme)
        moved = self._moved(parts)
        move_s = [wire.time_s(self.cluster) for wire in moved]
        # FLOPs of every (computing rank, key owner), [P, P]: 4 * D * Hq per causal pair
        rate = setup.shape.full_flops(1) * parts.pairs
        forward_s = np.asarray(setup.seconds(rate, setup.rates.full_forward_flops))
        backward_s = np.asarray(setup.seconds(BACKWARD_FACTOR * rate, setup.rates.full_backward_flops))
        traffic = {"full_query": moved} if any(wire.sent.any() for wire in moved) else {}
        forward, backward = Timeline(self.cp_size), Timeline(self.cp_size)
        # moves of queries and outputs are exposed: attention needs the first, the projection the second
        forward.compute(setup.overhead_s() + setup.projections_s())
        forward.collective("full_query", move_s[0])
        backward.compute(2 * setup.output_s())
        backward.collective("full_query", move_s[2])
        if scheme in _RINGS:
            self._ring(forward, forward_s, traffic, back=False)
            self._ring(backward, backward_s, traffic, back=True)
        elif scheme is FullScheme.selected:
            self._on_demand(forward, backward, (forward_s, backward_s), parts, traffic)
        else:
            self._whole(forward, backward, (forward_s, backward_s), (scheme, parts), traffic)
        forward.collective("full_query", move_s[1])
        forward.compute(setup.output_s())
        backward.collective("full_query", move_s[3])
        backward.compute(2 * setup.projections_s())
        first, second = forward.result(), backward.result()
        if setup.options.recompute:
            # the backward pass begins with the whole forward pass, its exchange and its moves included
            second = first + second
            traffic |= {name: traffic[name] * 2 for name in ("full_kv",) if name in traffic}
            traffic |= {name: [*traffic[name], *moved[:2]] for name in ("full_query",) if name in traffic}
        return self._as_report(scheme, (first, second), traffic)

    def _as_report(
        self,
        scheme: FullScheme,
        passes: tuple[LayerTime, LayerTime],
        traffic: dict[str, list[CollectiveCost]],
    ) -> SchemeReport:
        """Add memory: two shards and their gradients in a ring, else all fetched tokens and theirs, bytes."""
        # a ring works on one shard while the next one arrives, each with a gradient of its size
        rows = 4 * self.shard_bytes
        if scheme not in _RINGS:
            # own shard and what was fetched, each with a gradient of the same type
            rows = 2 * float(sum(wire.received.max() for wire in traffic["full_kv"][:1]) + self.shard_bytes)
        return SchemeReport(scheme.value, *passes, traffic, rows)

    def _parts(self, scheme: FullScheme) -> _Parts:
        # (balanced, ring) decide who computes what; all other schemes share the parts
        key = (scheme is not FullScheme.ring_unbalanced, scheme in _RINGS)
        if key not in self._known:
            self._known[key] = self._divide(*key)
        return self._known[key]

    def _divide(self, balanced: bool, ring: bool) -> _Parts:
        """Count the causal pairs of every two ranks.

        A unit of w queries sees w * w pairs in each earlier unit of its document, w * (w + 1) / 2 in itself.
        Example: 8 tokens in units of 2, ranks [0, 0, 1, 1] compute and hold -> [[10, 0], [16, 10]].
        """
        placement = self.setup.outer
        share, key_owner = share_full(placement, balanced=balanced, ring=ring)
        unit = share.unit
        per_block = placement.block_size // unit
        # units of the query's document that lie before it
        position = np.arange(share.owner.shape[0])
        doc_start = placement.doc_start[position // per_block] * per_block
        pairs = np.zeros((self.cp_size, self.cp_size))
        for rank in range(self.cp_size):
            # units of `rank` before each position; the difference of two is what lies in the document
            below = np.concatenate(([0], np.cumsum(key_owner == rank)))
            seen = (below[position] - below[doc_start]).astype(float) * unit * unit
            # a unit's own keys: the first query sees one of them, the last all
            seen += (key_owner == rank) * (unit * (unit + 1) / 2)
            pairs[:, rank] = np.bincount(share.owner, seen, minlength=self.cp_size)
        return _Parts(share, key_owner, pairs)

    def _moved(self, parts: _Parts) -> list[CollectiveCost]:
        """List four moves: queries (and keys) to who computes them, outputs back; then gradients of both.

        The gradient of an output goes where its query went, gradients of queries and keys return.
        """
        shape, unit = self.setup.shape, parts.share.unit
        heads = shape.num_heads * shape.head_dim * shape.element_bytes
        queries = collective_cost.all_to_all(parts.share.moved, heads, self.cluster)
        home = owners(self.setup.outer.plan, unit)
        # only a balanced ring moves keys; elsewhere the owners are those of the layout and nothing is added
        keys = moves(home, parts.key_owner, self.cp_size) * unit
        both = parts.share.moved * heads + keys * shape.kv_token_bytes
        there = collective_cost.all_to_all(both, 1.0, self.cluster)
        return [there, queries.reversed(), queries, there.reversed()]

    def _ring(
        self, clocks: Timeline, seconds: FloatArray, traffic: dict[str, list[CollectiveCost]], *, back: bool
    ) -> None:
        """Add a ring: P steps of computing, between them P - 1 shifts of a shard of keys and values."""
        size, rank = self.cp_size, np.arange(self.cp_size)
        step = collective_cost.shift(self.shard_bytes, size, self.cluster)
        if size > 1:
            traffic["full_kv_again" if back else "full_kv"] = [step.scaled(size - 1)]
        # a shard's gradient goes from each other rank straight to its owner: P - 1 messages, here at the
        # price of shifts
        if back and size > 1:
            traffic["full_kv_grad"] = [step.scaled(size - 1)]
        for number in range(size):
            # in step n rank r works on the shard of rank r - n
            part = seconds[rank, (rank - number) % size]
            # in the backward pass the gradients of the piece before travel along, not of the own one
            moved = (number < size - 1) + (back and number > 1)
            self._step(
                clocks, "full_kv_again" if back else "full_kv", part, moved * step.time_s(self.cluster)
            )
        if back and size > 1:
            clocks.neighbours("full_kv_grad", np.zeros(size), step.time_s(self.cluster))

    def _step(self, clocks: Timeline, name: str, seconds: FloatArray, wire_s: float) -> None:
        if wire_s == 0:
            clocks.compute(seconds)
        elif self.setup.options.overlap:
            clocks.neighbours(name, seconds, wire_s)
        else:
            clocks.neighbours(name, np.zeros_like(seconds), wire_s)
            clocks.compute(seconds)

    def _on_demand(
        self,
        forward: Timeline,
        backward: Timeline,
        seconds: tuple[FloatArray, FloatArray],
        parts: _Parts,
        traffic: dict[str, list[CollectiveCost]],
    ) -> None:
        """Add an exchange on demand: it runs under attention over own keys, forward and backward."""
        fetch, give = self._fetch(FullScheme.selected, parts)
        traffic["full_kv"], traffic["full_kv_grad"] = [fetch], [give]
        own = [np.diagonal(part) for part in seconds]
        # seconds over own keys hide the fetch; those over all others follow it
        remote = [part.sum(1) - mine for part, mine in zip(seconds, own, strict=True)]
        fetch_s, give_s = fetch.time_s(self.cluster), give.time_s(self.cluster)
        overlap = self.setup.options.overlap
        forward.under("full_kv", fetch_s, own[0], overlap=overlap)
        forward.compute(remote[0])
        if self.setup.options.keep_for_backward:
            backward.compute(remote[1])
            backward.under("full_kv_grad", give_s, own[1], overlap=overlap)
            return
        # fetched again: the way here takes own keys as cover, and the way back has none left
        traffic["full_kv_again"] = [fetch]
        backward.under("full_kv_again", fetch_s, own[1], overlap=overlap)
        backward.compute(remote[1])
        backward.collective("full_kv_grad", give_s)

    def _whole(
        self,
        forward: Timeline,
        backward: Timeline,
        seconds: tuple[FloatArray, FloatArray],
        asked: tuple[FullScheme, _Parts],
        traffic: dict[str, list[CollectiveCost]],
    ) -> None:
        """Add a gather of all keys, then attention: nothing overlaps; all_gather gathers again."""
        scheme, parts = asked
        fetch, give = self._fetch(scheme, parts)
        traffic["full_kv"], traffic["full_kv_grad"] = [fetch], [give]
        forward.collective("full_kv", fetch.time_s(self.cluster))
        forward.compute(seconds[0].sum(1))
        if scheme is FullScheme.all_gather:
            traffic["full_kv_again"] = [fetch]
            backward.collective("full_kv_again", fetch.time_s(self.cluster))
        backward.compute(seconds[1].sum(1))
        backward.collective("full_kv_grad", give.time_s(self.cluster))

    def _fetch(self, scheme: FullScheme, parts: _Parts) -> tuple[CollectiveCost, CollectiveCost]:
        """Return the collective that brings keys and values, and the one that returns their gradients."""
        if scheme is FullScheme.selected:
            rows = self._needed(parts)
            fetch = collective_cost.all_to_all(rows, self.setup.shape.kv_token_bytes, self.cluster)
            return fetch, fetch.reversed()
        gather = collective_cost.all_gather(self.shard_bytes, self.cp_size, self.cluster)
        if scheme is FullScheme.all_gather_all_reduce:
            return gather, collective_cost.all_reduce(self.shard_bytes, self.cp_size, self.cluster)
        # a reduce-scatter adds on its way, so in fp32 at least
        wide = max(FP32_BYTES / self.setup.shape.element_bytes, 1.0)
        return gather, collective_cost.reduce_scatter(wide * self.shard_bytes, self.cp_size, self.cluster)

    def _needed(self, parts: _Parts) -> IntArray:
        """Return [P, P] int64, tokens that each rank needs from each owner.

        A rank needs its documents up to its last query in them. Example: 8 tokens in units of 2, ranks [0, 0,
        1, 1] hold and [0, 0, 1, 0] compute -> [[4, 4], [4, 2]].
        """
        placement, share = self.setup.outer, parts.share
        per_block = placement.block_size // share.unit
        position = np.arange(share.owner.shape[0])
        doc_start = placement.doc_start[position // per_block] * per_block
        rows = np.zeros((self.cp_size, self.cp_size), dtype=np.int64)
        for rank in range(self.cp_size):
            mine = np.flatnonzero(share.owner == rank)
            # union of the intervals [document start, query]: sum of +1 where one begins, -1 behind its end
            change = np.zeros(position.shape[0] + 1, dtype=np.int64)
            np.add.at(change, doc_start[mine], 1)
            np.add.at(change, mine + 1, -1)
            needed = change[:-1].cumsum() > 0
            rows[rank] = np.bincount(parts.key_owner[needed], minlength=self.cp_size) * share.unit
        return rows

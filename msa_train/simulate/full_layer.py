"""One full-attention layer: a ring over the layout as it is or over zigzag chunks, or everything gathered."""

import numpy as np
from numpy.typing import NDArray

from msa_train.simulate import wire as wires
from msa_train.simulate.placement import Placement
from msa_train.simulate.question import FullScheme, Scheme
from msa_train.simulate.setup import SchemeReport, Setup
from msa_train.simulate.shape import BACKWARD_FACTOR
from msa_train.simulate.timeline import LayerTime, Timeline
from msa_train.simulate.wire import Wire

FloatArray = NDArray[np.float64]


class FullLayer:
    """Times and bytes of one layer call."""

    def __init__(self, setup: Setup, zigzag: Placement | None) -> None:
        """zigzag: the same pack split in zigzag chunks, for `ring_zigzag`."""
        self.setup, self.zigzag = setup, zigzag
        self.cluster, self.cp_size = setup.cluster, setup.cp_size
        self.shard_bytes = float(setup.tokens * setup.shape.kv_token_bytes)

    def report(self, scheme: FullScheme) -> SchemeReport:
        """One scheme's layer."""
        setup, placement = self.setup, self.setup.outer
        traffic: dict[str, list[Wire]] = {}
        move_s = back_s = 0.0
        if scheme is FullScheme.ring_zigzag:
            assert self.zigzag is not None, "made for this scheme"
            placement = self.zigzag
            moves, backs = self._conversion(placement)
            # forward: q, k, v there, outputs back; backward: their gradients the other way
            traffic["convert"] = [moves, backs, backs.reversed(), moves.reversed()]
            move_s, back_s = moves.time_s(self.cluster), backs.time_s(self.cluster)
        pairs = self._pairs(placement)
        forward_s = np.asarray(setup.seconds(setup.shape.full_flops(1) * pairs, setup.rates.full_forward_flops))
        backward_s = np.asarray(
            setup.seconds(BACKWARD_FACTOR * setup.shape.full_flops(1) * pairs, setup.rates.full_backward_flops)
        )
        run = self._ring if scheme in (FullScheme.ring, FullScheme.ring_zigzag) else self._whole
        forward, backward = Timeline(self.cp_size), Timeline(self.cp_size)
        forward.compute(setup.overhead_s() + setup.projections_s())
        backward.compute(2 * setup.output_s())
        for clocks, first, last in ((forward, move_s, back_s), (backward, back_s, move_s)):
            if first:
                clocks.collective("convert", first)
            run(clocks, scheme, forward_s if clocks is forward else backward_s, clocks is backward, traffic)
            if last:
                clocks.collective("convert", last)
        forward.compute(setup.output_s())
        backward.compute(2 * setup.projections_s())
        passes = forward.result(), backward.result()
        if setup.options.recompute:
            passes = passes[0], passes[0] + passes[1]
            for name in ("full_kv", "convert"):
                if name in traffic:
                    traffic[name] = traffic[name] + traffic[name][: 2 if name == "convert" else None]
        return self._as_report(scheme, passes, traffic)

    def _as_report(
        self, scheme: FullScheme, passes: tuple[LayerTime, LayerTime], traffic: dict[str, list[Wire]]
    ) -> SchemeReport:
        ring = scheme in (FullScheme.ring, FullScheme.ring_zigzag)
        rows = 4 if ring else 2 * self.cp_size
        name = Scheme(scheme.value) if scheme is not FullScheme.ring_zigzag else Scheme.ring
        return SchemeReport(name, *passes, traffic, rows * self.shard_bytes)

    def _pairs(self, placement: Placement) -> FloatArray:
        """[P, P] causal (query, key) pairs by owner of the query and of the key."""
        size = placement.block_size
        pairs = placement.visible_by_owner().astype(float) * size * size
        pairs[np.diag_indices(self.cp_size)] += placement.order.shape[1] * size * (size + 1) / 2
        return pairs

    def _conversion(self, zigzag: Placement) -> tuple[Wire, Wire]:
        """All-to-alls to zigzag chunks (q, k, v) and back (outputs)."""
        shape, size = self.setup.shape, self.setup.shape.block_size
        blocks = np.zeros((self.cp_size, self.cp_size), dtype=np.int64)
        np.add.at(blocks, (zigzag.owner, self.setup.outer.owner), 1)
        heads = shape.num_heads * shape.head_dim * shape.element_bytes * size
        return (
            wires.all_to_all(blocks, heads + shape.kv_token_bytes * size, self.cluster),
            wires.all_to_all(blocks.T, heads, self.cluster),
        )

    def _ring(
        self, clocks: Timeline, scheme: FullScheme, seconds: FloatArray, back: bool, traffic: dict[str, list[Wire]]
    ) -> None:
        size, rank = self.cp_size, np.arange(self.cp_size)
        step = wires.shift(self.shard_bytes, size, self.cluster)
        if size > 1:
            traffic["full_kv_again" if back else "full_kv"] = [step.scaled(size - 1)]
        if back and size > 1:
            traffic["full_kv_grad"] = [step.scaled(size)]
        for number in range(size):
            part = seconds[rank, (rank - number) % size]
            # in the backward pass the gradients of the piece before travel along
            moved = (number < size - 1) + (back and number > 0)
            self._step(clocks, part, moved * step.time_s(self.cluster))
        if back and size > 1:
            clocks.neighbours("full_kv_grad", np.zeros(size), step.time_s(self.cluster))

    def _step(self, clocks: Timeline, seconds: FloatArray, wire_s: float) -> None:
        if wire_s == 0:
            clocks.compute(seconds)
        elif self.setup.options.overlap:
            clocks.neighbours("full_kv", seconds, wire_s)
        else:
            clocks.neighbours("full_kv", np.zeros_like(seconds), wire_s)
            clocks.compute(seconds)

    def _whole(
        self, clocks: Timeline, scheme: FullScheme, seconds: FloatArray, back: bool, traffic: dict[str, list[Wire]]
    ) -> None:
        """Own shard first, under which the others travel; kept for the backward pass or fetched again."""
        own, size = np.diagonal(seconds).copy(), self.cp_size
        fetch, give = self._fetch(scheme)
        kept = back and scheme is not FullScheme.all_gather
        started = clocks.start()
        if not kept:
            traffic["full_kv_again" if back else "full_kv"] = [fetch]
        fetch_s = 0.0 if kept else fetch.time_s(self.cluster)
        hidden = self.setup.options.overlap and scheme is not FullScheme.all_gather_all_reduce
        if not hidden:
            clocks.finish("full_kv", started, fetch_s)
        rest = seconds.sum(axis=1) - own
        if not back:
            clocks.compute(own)
            clocks.finish("full_kv", started, fetch_s if hidden else 0.0)
            clocks.compute(rest)
            return
        traffic["full_kv_grad"] = [give] if size > 1 else []
        clocks.finish("full_kv", started, fetch_s if hidden else 0.0)
        clocks.compute(rest)
        returning = clocks.start()
        if not hidden:
            clocks.finish("full_kv_grad", returning, give.time_s(self.cluster))
        clocks.compute(own)
        if hidden:
            clocks.finish("full_kv_grad", returning, give.time_s(self.cluster))

    def _fetch(self, scheme: FullScheme) -> tuple[Wire, Wire]:
        """How keys and values come, and how their gradients return."""
        size = self.cp_size
        if scheme is FullScheme.selected:
            rows = self._prefixes()
            fetch = wires.all_to_all(rows, self.setup.shape.kv_token_bytes, self.cluster)
            return fetch, fetch.reversed()
        gather = wires.all_gather(self.shard_bytes, size, self.cluster)
        if scheme is FullScheme.all_gather_all_reduce:
            return gather, wires.all_reduce(self.shard_bytes, size, self.cluster)
        return gather, wires.reduce_scatter(self.shard_bytes, size, self.cluster)

    def _prefixes(self) -> NDArray[np.int64]:
        """[P, P] tokens that each rank needs from each owner."""
        placement = self.setup.outer
        rows = np.zeros((self.cp_size, self.cp_size), dtype=np.int64)
        for rank in range(self.cp_size):
            owners = placement.owner[placement.visible(rank)]
            rows[rank] = np.bincount(owners, minlength=self.cp_size) * placement.block_size
        return rows

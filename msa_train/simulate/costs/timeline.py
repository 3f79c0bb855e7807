"""Clocks of all ranks through one layer: computing, waiting, and what of the wire stays visible."""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class Among(Enum):
    """Who takes part in a collective, and so waits for whom."""

    everyone = "everyone"
    node = "node"  # the ranks of a node
    place = "place"  # the ranks in the same place of all nodes


@dataclass(slots=True)
class Mark:
    """Where the clocks stood when a collective started."""

    busy: FloatArray
    free: FloatArray


@dataclass(slots=True)
class LayerTime:
    """Seconds of one pass of a layer; total = compute + copying + imbalance + exposed.

    compute, copying: means over ranks; copying is the exchange's packing, unpacking and adding of rows.
    imbalance: waiting for slower ranks. exposed: what computing did not hide of the wire, in all and by
    collective. wire: what each collective takes by itself.
    """

    total: float
    compute: float
    copying: float
    imbalance: float
    exposed: float
    exposed_by: dict[str, float]
    wire: dict[str, float]

    def __add__(self, other: "LayerTime") -> "LayerTime":
        return LayerTime(
            self.total + other.total,
            self.compute + other.compute,
            self.copying + other.copying,
            self.imbalance + other.imbalance,
            self.exposed + other.exposed,
            {k: self.exposed_by.get(k, 0.0) + other.exposed_by.get(k, 0.0) for k in (self.wire | other.wire)},
            {k: self.wire.get(k, 0.0) + other.wire.get(k, 0.0) for k in (self.wire | other.wire)},
        )


@dataclass(slots=True)
class Timeline:
    """Two sets of clocks, [P] each: `busy` with the wire, `free` with one that takes no time.

    A collective ends on all its ranks at once: after the last one has started it and the wire has been
    used. The free clocks wait for each other as well, so the difference of the two is the wire's alone.
    """

    cp_size: int
    node_size: int = 0
    "ranks of a node, for collectives among parts of the ranks; 0: of no use"
    busy: FloatArray = field(init=False)
    free: FloatArray = field(init=False)
    computed: FloatArray = field(init=False)
    copied: FloatArray = field(init=False)
    exposed: dict[str, float] = field(default_factory=dict)
    wire: dict[str, float] = field(default_factory=dict)
    _last_name: str = ""

    def __post_init__(self) -> None:
        self.busy, self.free, self.computed, self.copied = (np.zeros(self.cp_size) for _ in range(4))

    def compute(self, seconds: FloatArray | float) -> None:
        """Every rank computes for so long: [P] or the same for all."""
        self._pass(seconds)
        self.computed = self.computed + seconds

    def copy(self, seconds: FloatArray | float) -> None:
        """The same for what only the exchange needs: packing, unpacking, adding rows."""
        self._pass(seconds)
        self.copied = self.copied + seconds

    def _pass(self, seconds: FloatArray | float) -> None:
        """Time goes by. Which rank is the last one may change: that is owed to the collective before."""
        before = self._lag()
        self.busy, self.free = self.busy + seconds, self.free + seconds
        if self._last_name:
            self._note(self._last_name, 0.0, before)

    def start(self) -> Mark:
        """A collective that runs beside what follows, until `finish`."""
        return Mark(self.busy, self.free)

    def finish(self, name: str, mark: Mark, seconds: float, among: Among = Among.everyone) -> None:
        """Wait for a collective that takes `seconds` from when the last of its ranks started it."""
        before = self._lag()
        self.busy = np.maximum(self.busy, self._last(mark.busy, among) + seconds)
        self.free = np.maximum(self.free, self._last(mark.free, among))
        self._note(name, seconds, before)

    def collective(self, name: str, seconds: float, among: Among = Among.everyone) -> None:
        """A collective under which nothing is computed."""
        self.finish(name, self.start(), seconds, among)

    def under(
        self,
        name: str,
        seconds: float,
        computing: FloatArray,
        among: Among = Among.everyone,
        *,
        overlap: bool,
    ) -> None:
        """A collective that runs under computing, or before it where nothing overlaps."""
        started = self.start()
        if not overlap:
            self.finish(name, started, seconds, among)
        self.compute(computing)
        if overlap:
            self.finish(name, started, seconds, among)

    def _last(self, clocks: FloatArray, among: Among) -> FloatArray:
        """[P] the latest clock of those that take part with a rank."""
        if among is Among.everyone:
            return np.full_like(clocks, clocks.max())
        grid = clocks.reshape(-1, self.node_size)
        latest = grid.max(axis=1 if among is Among.node else 0, keepdims=True)
        return np.broadcast_to(latest, grid.shape).reshape(-1)

    def neighbours(self, name: str, compute: FloatArray, seconds: float) -> None:
        """One step of a ring: compute while the previous rank's piece arrives; only neighbours wait."""
        before = self._lag()
        arrived = np.maximum(self.busy, np.roll(self.busy, 1)) + seconds
        self.busy = np.maximum(self.busy + compute, arrived)
        self.free = np.maximum(self.free + compute, np.roll(self.free, 1))
        self.computed = self.computed + compute
        self._note(name, seconds, before)

    def result(self) -> LayerTime:
        """Sums so far."""
        compute, copying = float(self.computed.mean()), float(self.copied.mean())
        return LayerTime(
            total=float(self.busy.max()),
            compute=compute,
            copying=copying,
            imbalance=float(self.free.max()) - compute - copying,
            exposed=self._lag(),
            exposed_by=dict(self.exposed),
            wire=dict(self.wire),
        )

    def _lag(self) -> float:
        return float(self.busy.max() - self.free.max())

    def _note(self, name: str, seconds: float, before: float) -> None:
        self._last_name = name
        self.exposed[name] = self.exposed.get(name, 0.0) + self._lag() - before
        self.wire[name] = self.wire.get(name, 0.0) + seconds

"""Move clocks of all ranks through one layer: computing, waiting, and what of the wire stays visible.

Each call costs O(P), so a layer of a few dozen calls on 256 ranks costs about 10,000 additions.
"""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class Among(Enum):
    """Name the ranks that take part in a collective, and so wait for one another."""

    everyone = "everyone"
    node = "node"  # the ranks of a node
    place = "place"  # the ranks in the same place of all nodes


@dataclass(slots=True)
class Mark:
    """Remember the clocks of the moment at which a collective started."""

    busy: FloatArray
    "[P] seconds"
    free: FloatArray
    "[P] seconds"


@dataclass(slots=True)
class LayerTime:
    """Hold the seconds of one pass of a layer; total = compute + copying + imbalance + exposed."""

    total: float
    "until the last rank is done, s"
    compute: float
    "computing, mean over ranks, s"
    copying: float
    "packing, unpacking and adding rows for the exchange, mean over ranks, s"
    imbalance: float
    "waiting for slower ranks, s"
    exposed: float
    "transfers that computing did not hide, s"
    exposed_by: dict[str, float]
    "the same by collective, s; an entry may be negative where a later one waits less"
    wire: dict[str, float]
    "time that each collective takes by itself, s"

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
    """Keep two sets of clocks, [P] each: `busy` with the wire, `free` with one that takes no time.

    A collective ends on all its ranks at once: after the last one has started it and the wire has been
    used. The free clocks wait for each other as well, so the difference of the two is the wire's alone.

    Example: 2 ranks compute 1 and 3 s, then a collective of 2 s: busy [5, 5], free [3, 3], so total 5 =
    compute 2 (mean) + imbalance 1 + exposed 2.
    """

    cp_size: int
    "P"
    node_size: int = 0
    "ranks of a node, for collectives among parts of the ranks; 0: of no use"
    busy: FloatArray = field(init=False)
    "[P] seconds, transfers included"
    free: FloatArray = field(init=False)
    "[P] seconds, as if transfers took none"
    computed: FloatArray = field(init=False)
    "[P] seconds of computing"
    copied: FloatArray = field(init=False)
    "[P] seconds of packing, unpacking and adding rows"
    exposed: dict[str, float] = field(default_factory=dict)
    "seconds that stayed visible, by collective"
    wire: dict[str, float] = field(default_factory=dict)
    "seconds of transfers, by collective"
    links: dict[str, FloatArray] = field(default_factory=dict)
    "[P] seconds by link, until which what was sent in the background holds it"
    _last_name: str = ""
    "collective that changes of the lag are owed to"

    def __post_init__(self) -> None:
        self.busy, self.free, self.computed, self.copied = (np.zeros(self.cp_size) for _ in range(4))

    def compute(self, seconds: FloatArray | float) -> None:
        """Let every rank compute for so many seconds: [P], or one number for all."""
        self._pass(seconds)
        self.computed = self.computed + seconds

    def copy(self, seconds: FloatArray | float) -> None:
        """Let every rank pack, unpack or add rows for so many seconds: what only the exchange needs."""
        self._pass(seconds)
        self.copied = self.copied + seconds

    def _pass(self, seconds: FloatArray | float) -> None:
        """Let time go by. Another rank may become the last one: that is owed to the collective before."""
        before = self._lag()
        self.busy, self.free = self.busy + seconds, self.free + seconds
        if self._last_name:
            self._note(self._last_name, 0.0, before)

    def start(self) -> Mark:
        """Start a collective that runs beside what follows, until `finish`."""
        return Mark(self.busy, self.free)

    def finish(self, name: str, mark: Mark, seconds: float, among: Among = Among.everyone) -> None:
        """Wait for a collective that takes `seconds` from when the last of its ranks started it.

        Example: started at 0 with 5 s, under computing of 1 and 3 s: busy [5, 5], free [1, 3], exposed 2.
        """
        before = self._lag()
        self.busy = np.maximum(self.busy, self._last(mark.busy, among) + seconds)
        self.free = np.maximum(self.free, self._last(mark.free, among))
        self._note(name, seconds, before)

    def collective(self, name: str, seconds: float, among: Among = Among.everyone) -> None:
        """Run a collective under which nothing is computed."""
        self.finish(name, self.start(), seconds, among)

    def send(self, name: str, ready: Mark, seconds: float, link: str, among: Among = Among.everyone) -> Mark:
        """Send in the background, after what was sent over the same link before; returns when it is there.

        Example: 2 ranks, ready at 1 and 3 s, 2 s long: there at [5, 5]; another one, ready at 0: at [7, 7].
        """
        held = self.links.get(link, np.zeros(self.cp_size))
        there = self._last(np.maximum(ready.busy, held), among) + seconds
        self.links[link] = there
        self.wire[name] = self.wire.get(name, 0.0) + seconds
        return Mark(there, self._last(ready.free, among))

    def wait(self, name: str, there: Mark) -> None:
        """Wait for what was sent in the background."""
        before = self._lag()
        self.busy, self.free = np.maximum(self.busy, there.busy), np.maximum(self.free, there.free)
        self._note(name, 0.0, before)

    def under(
        self,
        name: str,
        seconds: float,
        computing: FloatArray,
        among: Among = Among.everyone,
        *,
        overlap: bool,
    ) -> None:
        """Run a collective under computing, or before it where nothing overlaps.

        Example: 2 s under computing of 1 and 3 s: busy [2, 3], exposed 0; before it: busy [3, 5], exposed 2.
        """
        started = self.start()
        if not overlap:
            self.finish(name, started, seconds, among)
        self.compute(computing)
        if overlap:
            self.finish(name, started, seconds, among)

    def _last(self, clocks: FloatArray, among: Among) -> FloatArray:
        """Return [P] seconds, the latest clock of those that take part with a rank.

        Example: clocks [1, 2, 3, 4] in 2 nodes: everyone [4, 4, 4, 4], node [2, 2, 4, 4], place [3, 4, 3, 4].
        """
        if among is Among.everyone:
            return np.full_like(clocks, clocks.max())
        grid = clocks.reshape(-1, self.node_size)
        latest = grid.max(axis=1 if among is Among.node else 0, keepdims=True)
        return np.broadcast_to(latest, grid.shape).reshape(-1)

    def neighbours(self, name: str, compute: FloatArray, seconds: float) -> None:
        """Make one step of a ring: compute while the previous rank's piece arrives; only neighbours wait.

        Example: computing 1 and 3 s, a piece of 2 s: busy [2, 3], free [1, 3]; once more: busy [5, 6], free
        [3, 6].
        """
        before = self._lag()
        # a piece leaves when its sender has reached this step, and its receiver has posted for it
        arrived = np.maximum(self.busy, np.roll(self.busy, 1)) + seconds
        self.busy = np.maximum(self.busy + compute, arrived)
        self.free = np.maximum(self.free + compute, np.roll(self.free, 1))
        self.computed = self.computed + compute
        self._note(name, seconds, before)

    def result(self) -> LayerTime:
        """Sum up what has gone by so far."""
        compute, copying = float(self.computed.mean()), float(self.copied.mean())
        return LayerTime(
            total=float(self.busy.max()),
            compute=compute,
            copying=copying,
            # the free clocks hold work and waiting alone: what is not work is waiting for slower ranks
            imbalance=float(self.free.max()) - compute - copying,
            exposed=self._lag(),
            exposed_by=dict(self.exposed),
            wire=dict(self.wire),
        )

    # the wire's share of the time so far: both sets of clocks have done the same work and waited alike
    def _lag(self) -> float:
        return float(self.busy.max() - self.free.max())

    def _note(self, name: str, seconds: float, before: float) -> None:
        # telescoping: the changes of the lag, summed over collectives, are the lag at the end
        self._last_name = name
        self.exposed[name] = self.exposed.get(name, 0.0) + self._lag() - before
        self.wire[name] = self.wire.get(name, 0.0) + seconds

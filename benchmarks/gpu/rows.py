"""Hold what a run finds: rates of the device, times of operators and rivals, and their goals."""

from dataclasses import asdict, dataclass
from typing import Any

# A ratio counts only where the dense rival reaches this share of what the device can do.
LEAST_DENSE_SHARE = 0.55
INDEPENDENT, CORRELATED = "independent", "correlated"


@dataclass(frozen=True, slots=True)
class Rates:
    """Hold what this device did in this run."""

    matmul_flops: float
    """FLOP/s of a large matrix product."""
    copy_bytes: float
    """Bytes/s read and written by a large copy."""

    def floor_s(self, flops: float | None, num_bytes: float | None) -> float | None:
        """Compute the least seconds for so many operations and bytes: the roofline.

        Example: 8e14 FLOP and 1e12 bytes at 8e14 FLOP/s and 3e12 bytes/s -> max(1.0, 0.33) = 1.0.
        """
        parts = [
            (flops or 0.0) / self.matmul_flops,
            (num_bytes or 0.0) / self.copy_bytes,
        ]
        return max(parts) or None


@dataclass(slots=True)
class Row:
    """Hold one measurement of ours, beside a rival where there is one."""

    what: str
    """Operator or pass, as the goals name it."""
    seq_len: int
    """Tokens."""
    ours_s: float
    """Seconds of ours."""
    selection: str = INDEPENDENT
    """Of neighbouring queries: independent, or correlated."""
    flops: float | None = None
    """Operations that had to be done."""
    num_bytes: float | None = None
    """Bytes of memory that this design moves at least."""
    peak_gib: float | None = None
    """Most memory in use, in units of 2**30 bytes."""
    eager_s: float | None = None
    """Started from Python, where ours_s and the rival's time are replays of a CUDA graph."""
    distinct: float | None = None
    """Different blocks per group that 4 neighbouring queries select, mean."""
    rival_s: float | None = None
    """Seconds of the rival."""
    rival: str = ""
    """Its name."""
    rival_flops: float | None = None
    """Operations that it had to do."""
    rival_bytes: float | None = None
    """Bytes that it moves at least."""
    ratio: float | None = None
    """Seconds of the rival over ours."""
    tflops: float | None = None
    """10**12 operations per second of ours."""
    share_of_peak: float | None = None
    """Of the FLOP/s that a matrix product reached, from 0 to 1."""
    share_of_roofline: float | None = None
    """Least seconds over ours, from 0 to 1."""
    rival_tflops: float | None = None
    """10**12 operations per second of the rival."""
    rival_share: float | None = None
    """Of the rival's own roofline."""
    counts: bool = True
    """False where the rival is too far from what the device can do for the ratio to say anything."""

    @property
    def key(self) -> tuple[str, int, str]:
        """Identify the row: a later one with the same key takes its place."""
        return self.what, self.seq_len, self.selection

    def finish(self, rates: Rates) -> "Row":
        """Fill in what follows from the times."""
        floor = rates.floor_s(self.flops, self.num_bytes)
        self.share_of_roofline = None if floor is None else floor / self.ours_s
        if self.flops is not None:
            self.tflops = self.flops / self.ours_s / 1e12
            self.share_of_peak = self.flops / self.ours_s / rates.matmul_flops
        if self.rival_s is None:
            return self
        self.ratio = self.rival_s / self.ours_s
        floor = rates.floor_s(self.rival_flops, self.rival_bytes)
        if floor is not None:
            self.rival_share = floor / self.rival_s
            self.counts = self.rival_share >= LEAST_DENSE_SHARE
        if self.rival_flops is not None:
            self.rival_tflops = self.rival_flops / self.rival_s / 1e12
        return self

    def beside(self, dense: "Dense", rates: Rates) -> "Row":
        """Set this rival and what follows from it; returns the row."""
        self.rival_s, self.rival = dense.seconds, dense.by
        self.rival_flops, self.rival_bytes = dense.flops, dense.num_bytes
        return self.finish(rates)


@dataclass(slots=True)
class Dense:
    """Hold one measurement of dense attention, the rival of all rows of this name and length."""

    what: str
    """As the rows' own."""
    seq_len: int
    """Tokens."""
    seconds: float
    """Of one call."""
    by: str
    """Name of the kernel."""
    flops: float | None = None
    """Operations that had to be done."""
    num_bytes: float | None = None
    """Bytes that it moves at least."""


@dataclass(frozen=True, slots=True)
class Goal:
    """Say what a field of a row should be."""

    what: str
    """Of the row."""
    seq_len: int
    """0: of the longest measured, from SHORTEST on."""
    value: str
    """Name of the field."""
    least: float
    """Below it the goal is missed."""
    aim: float
    """From it on the aim is reached."""


SHORTEST = 2**15
GOALS = (
    Goal("prefill", 2**20, "ratio", 14.2, 20.0),
    Goal("training step", 2**20, "ratio", 30.0, 45.0),
    Goal("training step", 2**17, "ratio", 6.0, 10.0),
    Goal("training step", 2**15, "ratio", 1.5, 2.5),
    Goal("prefill", 2**15, "ratio", 1.0, 2.0),
    Goal("decode", 2**20, "ratio", 7.0, 7.9),
    Goal("decode against 48/8 heads", 2**20, "ratio", 14.0, 15.8),
    Goal("decode, fp8 index keys", 2**20, "ratio", 11.0, 12.0),
    Goal("selection of 1,024 queries against torch.topk", 2**17, "ratio", 5.1, 10.0),
    Goal("scoring", 0, "share_of_roofline", 0.75, 0.90),
    Goal("sparse forward", 0, "share_of_roofline", 0.75, 0.90),
    Goal("sparse backward + KL", 0, "share_of_roofline", 0.70, 0.90),
)


def verdict(goal: Goal, rows: list[Row]) -> dict[str, Any]:
    """Return the goal with what was found and whether it was reached, for independent selections."""
    fitting = [
        row
        for row in rows
        if (row.what, row.selection) == (goal.what, INDEPENDENT)
        and row.seq_len >= SHORTEST
        and goal.seq_len in (0, row.seq_len)
        and getattr(row, goal.value) is not None
    ]
    found: dict[str, Any] = asdict(goal) | {"found": None, "verdict": "not measured"}
    if not fitting:
        return found
    row = max(fitting, key=lambda row: row.seq_len)
    value = getattr(row, goal.value)
    said = "aim reached" if value >= goal.aim else "reached" if value >= goal.least else "missed"
    if goal.value == "ratio" and not row.counts:
        said = f"does not count: {row.rival} is at {row.rival_share:.0%} of its own roofline"
    return found | {"found": value, "seq_len": row.seq_len, "verdict": said}

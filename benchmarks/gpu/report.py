"""The table and the JSON of a run."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.gpu.check import Check


@dataclass(slots=True)
class Row:
    """One measurement. Seconds; ratio: dense time over ours; shares of the measured rates of this device.

    tflops, share_of_peak: by operations that had to be done. share_of_floor: least time that the bytes to be
    read take, over ours.
    """

    what: str
    seq_len: int
    ours_s: float
    dense_s: float | None = None
    dense_by: str = ""
    flops: float | None = None
    floor_bytes: float | None = None
    peak_gib: float | None = None
    ratio: float | None = None
    tflops: float | None = None
    share_of_peak: float | None = None
    share_of_floor: float | None = None

    def finish(self, rates: "Rates") -> "Row":
        """Fill in what follows from the times."""
        if self.dense_s is not None:
            self.ratio = self.dense_s / self.ours_s
        if self.flops is not None:
            self.tflops = self.flops / self.ours_s / 1e12
            self.share_of_peak = self.flops / self.ours_s / rates.matmul_flops
        if self.floor_bytes is not None:
            self.share_of_floor = self.floor_bytes / rates.copy_bytes / self.ours_s
        return self


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured on this device in this run."""

    matmul_flops: float
    copy_bytes: float


@dataclass(frozen=True, slots=True)
class Goal:
    """`value`, a field of a row, should be at least `least`, better `aim`.

    seq_len 0: of the longest measured, from SHORTEST on.
    """

    what: str
    seq_len: int
    value: str
    least: float
    aim: float


SHORTEST = 2**15
GOALS = (
    Goal("prefill", 2**20, "ratio", 14.2, 20.0),
    Goal("training step", 2**20, "ratio", 30.0, 45.0),
    Goal("training step", 2**17, "ratio", 6.0, 10.0),
    Goal("training step", 2**15, "ratio", 1.5, 2.5),
    Goal("prefill", 2**15, "ratio", 1.0, 2.0),
    Goal("decode", 2**20, "ratio", 7.6, 8.0),
    Goal("decode against 48/8 heads", 2**20, "ratio", 15.6, 16.0),
    Goal("selection against torch.topk", 2**17, "ratio", 5.1, 10.0),
    Goal("scoring", 0, "share_of_peak", 0.60, 0.75),
    Goal("sparse forward", 0, "share_of_peak", 0.45, 0.60),
    Goal("sparse backward + KL", 0, "share_of_peak", 0.35, 0.50),
)


@dataclass(slots=True)
class Result:
    """Everything that a run found."""

    command: str
    facts: dict[str, Any]
    rates: Rates | None = None
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def correct(self) -> bool:
        """Whether every check was made and passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN, which JSON lacks, is null."""
        content = asdict(self) | {
            "correct": self.correct,
            "goals": [_goal(goal, self.rows) for goal in GOALS],
        }
        return _without_nan(content)


def markdown(result: Result) -> str:
    """The same as tables."""
    facts = ", ".join(f"{name} {value}" for name, value in result.facts.items())
    lines = ["# Sparse attention kernels on a GPU", "", f"`{result.command}`", "", facts, ""]
    if not result.correct:
        lines += ["**A CHECK FAILED: what follows is not a result.**", ""]
    lines += ["| check | worst row | allowed | |", "|---|---|---|---|"]
    for check in result.checks:
        verdict = "passed" if check.passed else f"FAILED {check.text}".strip()
        lines.append(f"| {check.name} | {check.error:.3g} | {check.allowed:.3g} | {verdict} |")
    if result.rates is not None:
        lines += [
            "",
            f"Measured rates: matrix products {result.rates.matmul_flops / 1e12:.4g} TFLOP/s, copies "
            f"{result.rates.copy_bytes / 1e9:.4g} GB/s.",
        ]
    lines += [
        "",
        "| what | tokens | ours ms | dense ms | ratio | TFLOP/s | of peak | of the floor | peak GiB |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in result.rows:
        dense = "" if row.dense_s is None else f"{_number(row.dense_s * 1e3)} {row.dense_by}".strip()
        cells = [row.what, str(row.seq_len), _number(row.ours_s * 1e3), dense, _number(row.ratio)]
        cells += [_number(row.tflops), _percent(row.share_of_peak), _percent(row.share_of_floor)]
        lines.append(f"| {' | '.join([*cells, _number(row.peak_gib)])} |")
    lines += ["", "| goal | tokens | at least | aim | found | |", "|---|---|---|---|---|---|"]
    for goal in GOALS:
        found = _goal(goal, result.rows)
        value, tokens = _number(found["found"]) or "-", found["seq_len"] or "-"
        lines.append(f"| {goal.what} | {tokens} | {goal.least} | {goal.aim} | {value} | {found['verdict']} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in result.notes), ""])


def _goal(goal: Goal, rows: list[Row]) -> dict[str, Any]:
    fitting = [row for row in rows if row.what == goal.what and getattr(row, goal.value) is not None]
    if goal.seq_len:
        fitting = [row for row in fitting if row.seq_len == goal.seq_len]
    fitting = [row for row in fitting if row.seq_len >= SHORTEST]
    found: dict[str, Any] = asdict(goal) | {"found": None, "verdict": "not measured"}
    if fitting:
        row = max(fitting, key=lambda row: row.seq_len)
        value = getattr(row, goal.value)
        verdict = "aim reached" if value >= goal.aim else "reached" if value >= goal.least else "missed"
        found |= {"found": value, "seq_len": row.seq_len, "verdict": verdict}
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g}%"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

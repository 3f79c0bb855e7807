"""Write the JSON and the tables of a run, from its records; can be written at any time."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.gpu.comparison import Check, failed
from benchmarks.gpu.device_rates import AFTER, BEFORE
from benchmarks.gpu.records import CRASHED, DONE, FAILED, Record, without_nan
from benchmarks.gpu.rows import GOALS, Rates, Row, verdict
from benchmarks.gpu.variants import SHIPPED

# Rates before and after that are farther apart than this are pointed out.
STEADY_SHARE = 0.03


@dataclass(slots=True)
class Result:
    """Hold everything that a run found."""

    command: str
    facts: dict[str, Any]
    rates: dict[str, Rates] = field(default_factory=dict)
    """Before and after."""
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Steps that were not made, and why."""

    @property
    def correct(self) -> bool:
        """Tell whether checks were made and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Return plain values; NaN, which JSON lacks, is null."""
        content = asdict(self) | {
            "correct": self.correct,
            "goals": [verdict(goal, self.rows) for goal in GOALS],
        }
        return without_nan(content)


def load(records: Sequence[Record]) -> Result:
    """Put together what all calls with one output folder have found; later records count."""
    starts = [record for record in records if record["kind"] == "run"]
    result = Result(starts[0]["command"], starts[-1]["facts"])
    checks: dict[str, Check] = {}
    rows: dict[tuple[str, int, str], Row] = {}
    ends: dict[tuple[str, str], Record] = {}
    for record in records:
        kind = record["kind"]
        if kind == "rates":
            result.rates[record["when"]] = Rates(record["matmul_flops"], record["copy_bytes"])
        elif kind == "check":
            checks[record["name"]] = _check(record)
        elif kind == "row":
            row = Row(**{part.name: record[part.name] for part in fields(Row)})
            rows[row.key] = row
        elif kind == "end":
            ends[record["part"], record["step"]] = record
        elif kind == "note" and record["text"] not in result.notes:
            result.notes.append(record["text"])
    for (part, step), end in ends.items():
        if end["status"] == DONE:
            continue
        result.missing.append(f"{part}, {step}: {end['status']}: {end['why']}")
        if part.startswith("checks-") and end["status"] in (FAILED, CRASHED):
            checks[step] = failed(step, end["why"] or end["status"])
    result.checks, result.rows = list(checks.values()), list(rows.values())
    return result


def _check(record: Record) -> Check:
    error, allowed = (float("nan") if record[name] is None else record[name] for name in ("error", "allowed"))
    return Check(record["name"], error, allowed, record["text"])


def write(result: Result, folder: Path) -> None:
    """Write gpu.json and gpu.md, each whole or as it was before."""
    texts = {"gpu.json": json.dumps(result.as_json(), indent=1) + "\n", "gpu.md": markdown(result)}
    for name, text in texts.items():
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)


def markdown(result: Result) -> str:
    """Return the tables."""
    facts = ", ".join(f"{name} {value}" for name, value in result.facts.items())
    lines = ["# Sparse attention kernels on a GPU", "", f"`{result.command}`", "", facts, ""]
    if not result.correct:
        lines += ["**A CHECK FAILED: what depends on it is no result, and was not timed.**", ""]
    lines += ["| check | worst row | allowed | |", "|---|---|---|---|"]
    for check in result.checks:
        said = "passed" if check.passed else f"FAILED {check.text}".strip()
        lines.append(f"| {check.name} | {check.error:.3g} | {check.allowed:.3g} | {said} |")
    lines += ["", *_rates(result)]
    plain = [row for row in result.rows if not _is_variant(row)]
    lines += [*_rows(plain), "", *_goals(result.rows)]
    if others := [row for row in result.rows if _is_variant(row)]:
        lines += ["", *_variants(others)]
    notes = [f"- {note}" for note in result.notes]
    missing = [f"- not measured: {text}" for text in result.missing]
    return "\n".join([*lines, "", *notes, *missing, ""])


def row_text(row: Row) -> str:
    """Return a row in one line, for people who wait for it."""
    parts = [f"{row.what}, {row.seq_len} tokens, {row.selection}: {_number(row.ours_s * 1e3)} ms"]
    if row.tflops is not None:
        parts.append(f"{_number(row.tflops)} TFLOP/s, {_percent(row.share_of_peak)} of peak")
    if row.share_of_roofline is not None:
        parts.append(f"{_percent(row.share_of_roofline)} of the roofline")
    if row.ratio is not None:
        parts.append(f"{_number(row.ratio)}x {row.rival}{'' if row.counts else ' (does not count)'}")
    return "; ".join(parts)


def _rates(result: Result) -> list[str]:
    lines = []
    for when, rates in result.rates.items():
        lines.append(
            f"Rates {when}: matrix products {rates.matmul_flops / 1e12:.4g} TFLOP/s, copies "
            f"{rates.copy_bytes / 1e9:.4g} GB/s."
        )
    both = [result.rates.get(when) for when in (BEFORE, AFTER)]
    if both[0] is not None and both[1] is not None:
        change = both[1].matmul_flops / both[0].matmul_flops - 1
        if abs(change) > STEADY_SHARE:
            lines.append(f"**The rate of products changed by {change:+.1%}: shares are of the first.**")
    return [*lines, ""]


def _rows(rows: list[Row]) -> list[str]:
    heads = (
        "what", "tokens", "selection", "blocks of 4", "ours ms", "TFLOP/s", "of peak", "of roofline", "GiB",
        "rival ms", "rival TFLOP/s", "rival of its roofline", "ratio",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        ours = _number(row.ours_s * 1e3)
        if row.eager_s is not None:
            ours += f" (from Python {_number(row.eager_s * 1e3)})"
        rival = "" if row.rival_s is None else f"{_number(row.rival_s * 1e3)} {row.rival}"
        ratio = _number(row.ratio) if row.counts else f"({_number(row.ratio)})"
        cells = (
            row.what, str(row.seq_len), row.selection, _number(row.distinct), ours, _number(row.tflops),
            _percent(row.share_of_peak), _percent(row.share_of_roofline), _number(row.peak_gib),
            rival, _number(row.rival_tflops), _percent(row.rival_share), ratio,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _goals(rows: list[Row]) -> list[str]:
    lines = ["| goal | value | tokens | at least | aim | found | |", "|---|---|---|---|---|---|---|"]
    for goal in GOALS:
        found = verdict(goal, rows)
        value, tokens = _number(found["found"]) or "-", found["seq_len"] or "-"
        cells = (goal.what, goal.value, tokens, goal.least, goal.aim, value, found["verdict"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _variants(rows: list[Row]) -> list[str]:
    lines = ["| other tiles and divisions | tokens | ms | shipped over it |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.what} | {row.seq_len} | {_number(row.ours_s * 1e3)} | {_number(row.ratio)} |")
    return lines


def _is_variant(row: Row) -> bool:
    return row.rival == SHIPPED or row.what.endswith(SHIPPED)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g}%"

"""Write tables, JSON and plots of the extension benchmark from what its runs have left."""

import json
from pathlib import Path
from typing import Any

from benchmarks.extension.plots import plot
from benchmarks.extension.recipe import LONG, MINI, NEEDLES, RUNS, SHORT, STUDIED, UNORDERED
from benchmarks.extension.shares import CP_SIZES, shares_over_training
from benchmarks.machine import machine
from msa_train.evaluation.log import LOG_NAME, read_rows
from msa_train.simulate.reports.text import table

NAME = "extension"
_SHORT_BINS = SHORT.bit_length() - 1
"log2 bins of positions below SHORT"
_KEPT = (
    "samples",
    "hit_rate",
    "hit_interval",
    "token_accuracy",
    "nll_per_token",
    "by_depth",
    "needle_rate_mean",
)
Row = dict[str, Any]


def write_report(runs: Path, results: Path, command: str) -> str:
    """Write RESULTS/extension.{json,md} and plots; return the page.

    Raises:
        OSError: a run has left no results.
    """
    found = collect(runs) | {"command": command, "machine": machine()}
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{NAME}.json").write_text(json.dumps(found, indent=1) + "\n")
    text = page(found)
    (results / f"{NAME}.md").write_text(text)
    plot(found, results)
    return text


def collect(runs: Path) -> dict[str, Any]:
    """Gather evaluations, f over training, the study of rules, and minutes."""
    evaluated = {f"{MINI}_{end}": f"{MINI}_{end}" for end in ("short", "long")}
    evaluated |= {run.name: run.name for run in RUNS}
    studied = runs / "rules.json"
    rules = json.loads(studied.read_text()) if studied.exists() else []
    return {
        "evaluations": {name: figures(read_rows(runs / name / LOG_NAME)) for name in evaluated},
        "f": {name: shares_over_training(runs / name, LONG) for name in (MINI, STUDIED, "long_near")},
        "rules": [{"rule": one["rule"], "f": one["f"], "figures": figures(one["rows"])} for one in rules],
        "minutes": {
            path.stem: round(float(path.read_text()) / 60, 1) for path in sorted(runs.glob("*.done"))
        },
    }


def figures(rows: list[Row]) -> Row:
    """Take of evaluation rows what the tables show.

    hits and NLL per token by task and length, the worst depth of single needles, how often needles were
    selected, and the loss of held-out documents at positions below SHORT and at all.
    """
    result: Row = {"tasks": {}}
    for row in rows:
        if row["kind"] == "task":
            result["tasks"][f"{row['task']}@{row['length']}"] = {key: row.get(key) for key in _KEPT}
        elif row["kind"] == "position_loss":
            bins = {int(number): values for number, values in row["loss_by_log2"].items()}
            result["short_loss"] = _mean({n: v for n, v in bins.items() if n < _SHORT_BINS})
            result["loss"] = _mean(bins)
    return result


def _mean(bins: dict[int, list[float]]) -> float:
    return sum(count * loss for count, loss in bins.values()) / sum(count for count, _ in bins.values())


def worst_depth(task: Row) -> float:
    """Return the lowest share of hits over depths. Example: {"0.00": [9, 10], "1.00": [10, 10]} -> 0.9."""
    return min(hits / count for hits, count in task["by_depth"].values())


def page(found: dict[str, Any]) -> str:
    """Write the tables as Markdown."""
    where, evaluations = found["machine"], found["evaluations"]
    before, after = evaluations[f"{MINI}_short"], evaluations[f"{MINI}_long"]
    change = after["short_loss"] / before["short_loss"] - 1
    parts = [
        f"# From {SHORT:,} to {LONG:,} tokens with a tiny model",
        f"`{found['command']}`, {where['cpu']}, {where['cores']} cores, commit {where['commit']}. Hits are "
        "teacher-forced, 95% intervals in brackets; other figures are nats per token. Tasks at the "
        "long length unless said.",
        f"Time: {found['minutes'][MINI]:.0f} minutes for {MINI} on both cores, "
        f"{sum(found['minutes'].values()) - found['minutes'][MINI]:.0f} for all the others, one core each.",
        "## run=extend_mini",
        f"Loss of held-out documents at positions below {SHORT:,}: {before['short_loss']:.4f} before, "
        f"{after['short_loss']:.4f} after ({change:+.2%}).",
        _lines(_proof(before, after)),
        "## What else was tried",
        "One process each, all from the same weights; equal steps.",
        _lines(_variants(evaluations)),
        f"## f over training at {LONG:,} tokens",
        "Share of remote (block, KV head) pairs that some query of a rank selects, layers 1 to 3. A query "
        "sees what lies before it, so 0.500 is all that can be selected.",
        *(f"`{name}`:\n\n{_lines(_shares(steps))}" for name, steps in found["f"].items()),
    ]
    if found["rules"]:
        parts += [f"## Other rules of selection, `{STUDIED}`", _lines(_rules(found["rules"]))]
    return "\n\n".join(parts) + "\n"


def _lines(rows: list[list[str]]) -> str:
    return "\n".join(table(rows))


def _hits(task: Row | None) -> str:
    if task is None or task["hit_rate"] is None:
        return "-"
    low, high = task["hit_interval"]
    return f"{task['hit_rate']:.2f} [{low:.2f}, {high:.2f}]"


def _proof(before: Row, after: Row) -> list[list[str]]:
    rows = [
        ["task", "tokens", f"trained at {SHORT}", f"extended to {LONG}", "worst depth", "needle selected"]
    ]
    for name, task in after["tasks"].items():
        kind, length = name.split("@")
        was = before["tasks"][name]
        if task["hit_rate"] is None:
            rows.append(
                [kind, length, f"{was['nll_per_token']:.3f}", f"{task['nll_per_token']:.3f}", "-", "-"]
            )
            continue
        rate, depths = task["needle_rate_mean"], task["by_depth"]
        worst = f"{worst_depth(task):.2f}" if depths else "-"
        rows.append([kind, length, _hits(was), _hits(task), worst, "-" if rate is None else f"{rate:.2f}"])
    return rows


def _variants(evaluations: dict[str, Row]) -> list[list[str]]:
    tasks = [f"{name}@{LONG}" for name in NEEDLES]
    unordered = [f"{name}@{LONG}" for name in UNORDERED]
    heads = [name.split("@")[0] for name in (*tasks, *unordered)]
    rows = [["run", "what", *heads, f"loss below {SHORT}", "loss"]]
    for run in RUNS:
        one = evaluations[run.name]
        rows.append(
            [run.name, run.what]
            + [_hits(one["tasks"].get(name)) for name in tasks]
            + [f"{one['tasks'][name]['nll_per_token']:.3f}" for name in unordered]
            + [f"{one['short_loss']:.4f}", f"{one['loss']:.4f}"]
        )
    return rows


def _shares(steps: dict[int, dict[str, dict[str, float]]]) -> list[list[str]]:
    rows = [["step", *(f"cp {cp_size}" for cp_size in CP_SIZES)]]
    for step, by_cp in steps.items():
        cells = [" ".join(f"{f:.3f}" for f in by_cp[str(cp_size)].values()) for cp_size in CP_SIZES]
        rows.append([str(step), *cells])
    return rows


def _rules(rules: list[Row]) -> list[list[str]]:
    tasks = [f"{name}@{LONG}" for name in NEEDLES]
    heads = [name.split("@")[0] for name in tasks]
    rows = [["rule", *(f"f at cp {cp_size}" for cp_size in CP_SIZES), *heads, "loss"]]
    for one in rules:
        means = [
            sum(sum(heads) / len(heads) for heads in layers.values()) / len(layers)
            for layers in one["f"].values()
        ]
        rows.append(
            [one["rule"], *(f"{f:.3f}" for f in means)]
            + [_hits(one["figures"]["tasks"].get(name)) for name in tasks]
            + [f"{one['figures']['loss']:.4f}"]
        )
    return rows

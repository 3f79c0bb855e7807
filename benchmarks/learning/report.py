"""Write table, JSON and plots of finished runs of the learning benchmark.

python -m benchmarks.learning.report --runs runs/learning --results benchmarks/results
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.learning.plots import Runs, plot
from benchmarks.learning.recipe import BLOCK_SIZE, SEQ_LEN, TOPK, Variant
from benchmarks.machine import ROOT, machine


def read_runs(folder: Path) -> Runs:
    """Read the finished runs in a folder."""
    runs: Runs = {}
    for variant in Variant:
        for path in sorted(folder.glob(f"{variant.value}_[0-9]*.jsonl")):
            head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
            if rows and rows[-1]["step"] == head["steps"]:
                runs.setdefault(variant.value, {})[head["seed"]] = rows
    return runs


def commits(folder: Path) -> list[str]:
    """List the commits of the code that the runs in a folder were made with."""
    heads = [json.loads(path.open().readline()) for path in sorted(folder.glob("*_[0-9]*.jsonl"))]
    return sorted({head.get("commit", "unknown") for head in heads})


def summary(runs: Runs) -> dict[str, Any]:
    """Collect each run's last measurement, and each variant against full attention with the same seed."""
    result: dict[str, Any] = {}
    for variant, by_seed in runs.items():
        entry: dict[str, Any] = {"seeds": sorted(by_seed)}
        for key in ("text_loss", "lookup_loss", "accuracy", "cpu_s", "tokens"):
            entry[key] = {seed: rows[-1][key] for seed, rows in by_seed.items()}
        paired = [seed for seed in by_seed if seed in runs.get("full", {})]
        full = runs.get("full", {})
        entry["text_loss_over_full"] = {
            seed: by_seed[seed][-1]["text_loss"] / full[seed][-1]["text_loss"] - 1 for seed in paired
        }
        entry["accuracy_over_full"] = {
            seed: by_seed[seed][-1]["accuracy"] / full[seed][-1]["accuracy"] for seed in paired
        }
        entry["by_distance"] = {seed: rows[-1]["by_distance"] for seed, rows in by_seed.items()}
        entry["layers"] = {seed: rows[-1]["layers"] for seed, rows in by_seed.items()}
        result[variant] = entry
    return result


def table(found: dict[str, Any], where: dict[str, Any]) -> str:
    """Write the table as Markdown."""
    lines = [
        "# Does MSA learn what full attention learns?",
        "",
        f"`python -m benchmarks.learning.run_all`, commit {where['commit']}, {where['cores']} cores, Python "
        f"{where['python']}; sequences of {SEQ_LEN}, {TOPK} blocks of {BLOCK_SIZE} per query and group. Means"
        " over seeds (lowest to highest). Text loss in nats per byte of held-out text; accuracy of key-value "
        "lookups.",
        "",
        "| variant | seeds | text loss | against full | lookup accuracy | of full's | CPU min |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, entry in found.items():
        lines.append(
            f"| {variant} | {len(entry['seeds'])} | {_spread(entry['text_loss'], '.4f')} | "
            f"{_spread(entry['text_loss_over_full'], '+.2%')} | {_spread(entry['accuracy'], '.3f')} | "
            f"{_spread(entry['accuracy_over_full'], '.1%')} | {mean(entry['cpu_s'].values()) / 60:.1f} |"
        )
    lines += ["", "Accuracy by distance in tokens:", ""]
    first = next(iter(found.values()))["by_distance"]
    edges = [f"{b['from']}-{b['below'] - 1}" for b in next(iter(first.values()))]
    lines += [f"| variant | {' | '.join(edges)} |", "|---" * (len(edges) + 1) + "|"]
    for variant, entry in found.items():
        buckets = zip(*entry["by_distance"].values(), strict=True)
        cells = [f"{mean(bucket['accuracy'] for bucket in each):.3f}" for each in buckets]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_selection_tables(found)]) + "\n"


def _selection_tables(found: dict[str, Any]) -> list[str]:
    """Write recall and f of the variants that select blocks."""
    lines = [
        "Block recall and score recall per layer (all positions / lookups), the score recall that the best "
        "possible blocks would have, and f of each KV group (1 would be every remote block; half of them lie "
        "in the future, so 0.5 is the most):",
        "",
        "| variant | layer | block recall | score recall | best possible | f at cp 2, 4, 8, 16 |",
        "|---|---|---|---|---|---|",
    ]
    for variant, entry in found.items():
        runs = list(entry["layers"].values())
        for layer in runs[0]:

            def figure(name: str, layer: str = layer, runs: list[Any] = runs) -> str:
                return " / ".join(
                    f"{mean(run[layer][f'{name}_{place}'] for run in runs):.3f}"
                    for place in ("text", "query")
                )

            shares: list[str] = []
            for cp_size in runs[0][layer]["f"]:
                by_group = zip(*(run[layer]["f"][cp_size] for run in runs), strict=True)
                shares.append("/".join(f"{mean(values):.2f}" for values in by_group))
            lines.append(
                f"| {variant} | {layer} | {figure('block_recall')} | {figure('score_recall')} | "
                f"{figure('best_score_recall')} | {', '.join(shares)} |"
            )
    return lines


def _spread(values: dict[int, float], form: str) -> str:
    if not values:
        return "-"
    low, high = min(values.values()), max(values.values())
    text = f"{mean(values.values()):{form}}"
    return text if len(values) == 1 else f"{text} ({low:{form}} to {high:{form}})"


def write_report(runs_folder: Path, results: Path) -> str:
    """Write learning.md, learning.json and plots in `results`; returns the table."""
    runs = read_runs(runs_folder)
    if not runs:
        raise ValueError(f"--runs={runs_folder}: holds no finished run; use run_all first")
    where = machine() | {"commit": ", ".join(commits(runs_folder))}
    found = summary(runs)
    results.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "python -m benchmarks.learning.run_all",
        "machine": where,
        "final": found,
        "curves": runs,
    }
    (results / "learning.json").write_text(json.dumps(content) + "\n")
    text = table(found, where)
    (results / "learning.md").write_text(text)
    plot(runs, results)
    return text


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    print(write_report(arguments.runs, arguments.results))


if __name__ == "__main__":
    main()

"""Read what parts of a visit left: a training run that was resumed, counters of a profiler.

python benchmarks/gpu/visit.py training RUN_DIR --steps 40      # exit code 1 if it did not train
python benchmarks/gpu/visit.py counters scoring.csv forward.csv
"""

import argparse
import csv
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run, one row per step."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def training_faults(rows: list[dict[str, Any]], steps: int) -> list[str]:
    """List what is wrong with a run: each step must be there once, with a finite loss, which falls."""
    faults: list[str] = []
    found = [row["step"] for row in rows]
    if found != list(range(1, steps + 1)):
        faults.append(f"steps of metrics.jsonl are {found}, not 1 to {steps}")
    losses = [row.get("lm_loss") for row in rows]
    if any(loss is None or not math.isfinite(loss) for loss in losses):
        return [*faults, f"a loss is missing or not finite: {losses}"]
    part = max(1, len(losses) // 4)
    begin, end = (statistics.fmean(some) for some in (losses[:part], losses[-part:]))
    if not end < begin:
        faults.append(f"the loss does not fall: {begin:.3f} in the first {part} steps, {end:.3f} in the last")
    return faults


def training_line(rows: list[dict[str, Any]]) -> str:
    """Write loss, memory and speed of a run, in one line."""
    memory = max((row["memory_gib"] for row in rows if "memory_gib" in row), default=float("nan"))
    speed = statistics.median(row["tokens_per_s"] for row in rows)
    losses = f"loss {rows[0]['lm_loss']:.3f} -> {rows[-1]['lm_loss']:.3f}"
    return f"{losses} in {len(rows)} steps, peak {memory:.2f} GiB, {speed:,.0f} tokens/s (median)"


def read_counters(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Read the kernels of ncu's raw CSV, each with its values and units.

    Example: rows '"ID","Kernel Name","dram__bytes_read.sum"', '"","","Gbyte"', '"0","attend_kernel","1.2"' ->
    [("attend_kernel", {"dram__bytes_read.sum": "1.2 Gbyte"})].
    """
    rows = list(csv.reader(path.read_text(encoding="utf-8", errors="replace").splitlines()))
    begin = next((i for i, row in enumerate(rows) if "Kernel Name" in row), None)
    if begin is None or len(rows) < begin + 3:
        return []
    names, units = rows[begin], rows[begin + 1]
    found = []
    for row in rows[begin + 2 :]:
        if len(row) == len(names):
            values = zip(names, row, units, strict=True)
            counters = {name: f"{value} {unit}".strip() for name, value, unit in values if "__" in name}
            found.append((row[names.index("Kernel Name")], counters))
    return found


def _training(arguments: argparse.Namespace) -> int:
    rows = read_rows(arguments.run_dir)
    faults = training_faults(rows, arguments.steps)
    for fault in faults:
        print(f"{arguments.run_dir}: {fault}")
    if not faults:
        print(training_line(rows))
    return 1 if faults else 0


def _counters(arguments: argparse.Namespace) -> int:
    lacking = 0
    for path in arguments.files:
        kernels = read_counters(path) if path.exists() else []
        if not kernels:
            print(f"{path.name}: no kernel was measured")
            lacking += 1
        for kernel, counters in kernels:
            print(f"{path.stem}: {kernel}")
            for name, value in counters.items():
                print(f"    {name:<70} {value}")
    return 1 if lacking else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("training", help="is this run whole, and did it learn?")
    training.add_argument("run_dir", type=Path)
    training.add_argument("--steps", type=int, required=True)
    training.set_defaults(run=_training)
    counters = commands.add_parser("counters", help="values of ncu --csv --page raw")
    counters.add_argument("files", type=Path, nargs="+")
    counters.set_defaults(run=_counters)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())

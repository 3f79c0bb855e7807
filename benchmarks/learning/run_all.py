"""Train all variants with three seeds, as many at a time as there are cores, and write the report.

    python -m benchmarks.learning.run_all

A run that is finished in OUT is not repeated, so an interrupted benchmark goes on where it stopped; a run
that was cut off starts anew.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.learning.recipe import STEPS, Variant
from benchmarks.learning.report import write_report
from benchmarks.machine import ROOT

SEEDS = (1, 2, 3)


def is_finished(path: Path, steps: int) -> bool:
    """Tell whether a run of this length reached its last step."""
    if not path.exists():
        return False
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return len(rows) > 1 and rows[0]["steps"] == steps and rows[-1]["step"] == steps


def train(variant: Variant, seed: int, steps: int, out: Path) -> None:
    """Train one run in a process of its own; its lines go to OUT/VARIANT_SEED.log."""
    name = f"{variant.value}_{seed}"
    if is_finished(out / f"{name}.jsonl", steps):
        print(f"{name}: finished before", flush=True)
        return
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.learning.run_one", "--variant", variant.value]
    command += ["--seed", str(seed), "--steps", str(steps), "--out", str(out)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (out / f"{name}.log").open("w") as log:
        subprocess.run(command, check=True, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT)
    print(f"{name}: {(time.monotonic() - start) / 60:.1f} min", flush=True)


def main() -> None:
    """Read the command line, train, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--at-a-time", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.at_a_time) as pool:
        # Seed by seed, so that what is there after an interruption can be compared.
        runs = [
            pool.submit(train, variant, seed, arguments.steps, out)
            for seed in arguments.seeds
            for variant in Variant
        ]
        for run in runs:
            run.result()
    print(write_report(out, arguments.results))


if __name__ == "__main__":
    main()

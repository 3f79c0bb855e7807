"""Make the proof of the extension: all runs, evaluations and the study of selections, then the report.

    python -m benchmarks.extension.run_all

What is finished in RUNS is not repeated, so an interrupted benchmark goes on where it stopped. One process a
run, as many at a time as there are cores, but for `run=extend_mini` itself, which has two.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks.extension.recipe import (
    LONG,
    MINI,
    MINI_ROPE,
    NEEDLES,
    RUNS,
    STUDIED,
    Run,
    corpora,
    evaluation,
    mini_training,
    stage_end,
    training,
)
from benchmarks.extension.report import write_report
from benchmarks.machine import ROOT, command


class Jobs:
    """Start commands of the project, each with a log and a mark that it is finished."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def do(
        self, name: str, module: str, arguments: Sequence[str], environment: dict[str, str] | None = None
    ) -> None:
        """Run a command unless it is finished.

        Raises:
            CalledProcessError: it failed; its log says why.
        """
        done = self.runs / f"{name}.done"
        if done.exists():
            return
        start = time.monotonic()
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(environment or {})}
        with (self.runs / f"{name}.log").open("w") as log:
            subprocess.run(
                [sys.executable, "-m", module, *arguments],
                check=True,
                cwd=ROOT,
                env=environ,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        seconds = time.monotonic() - start
        done.write_text(f"{seconds:.0f}\n")
        print(f"{name}: {seconds / 60:.1f} min", flush=True)


def synthesize(jobs: Jobs) -> None:
    """Write the documents that teach to look back; what was cut off is written anew."""
    for source, arguments in corpora(str(jobs.runs)).items():
        output = Path(arguments[arguments.index("--output") + 1])
        if not (jobs.runs / f"data_{source}.done").exists():
            shutil.rmtree(output, ignore_errors=True)
        jobs.do(f"data_{source}", "launchers.data", arguments)


def evaluate_mini(jobs: Jobs, stage: str) -> None:
    """Evaluate the run that ships at the end of a stage: ten samples at each of ten depths, in the end."""
    runs, name = str(jobs.runs), f"{MINI}_{stage}"
    rope, samples = (MINI_ROPE, 100) if stage == "long" else ((), 50)
    arguments = evaluation(runs, name, rope, load=stage_end(runs, stage), samples=samples)
    jobs.do(name, "launchers.evaluate", arguments)


def train_and_evaluate(jobs: Jobs, run: Run, before: Future[None] | None) -> None:
    """Train a run after the one that it begins from, and evaluate it."""
    if before is not None:
        before.result()
    runs = str(jobs.runs)
    jobs.do(run.name, run.command, training(run, runs), dict(run.environment))
    jobs.do(f"{run.name}_eval", "launchers.evaluate", evaluation(runs, run.name, run.model))


def study(jobs: Jobs, run: Run, before: Future[None]) -> None:
    """Evaluate a run under other rules of selection."""
    before.result()
    result = str(jobs.runs / "rules.json")
    asked = evaluation(str(jobs.runs), run.name, run.model, tasks=NEEDLES, lengths=(LONG,), samples=10)
    arguments = [result, *asked]
    jobs.do("rules", "benchmarks.extension.locality", arguments)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, train, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/extension"))
    parser.add_argument("--at-a-time", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    jobs = Jobs(arguments.runs.resolve())
    jobs.runs.mkdir(parents=True, exist_ok=True)
    synthesize(jobs)
    jobs.do(MINI, "launchers.train", mini_training(str(jobs.runs)))
    with ThreadPoolExecutor(arguments.at_a_time) as pool:
        # in the order of RUNS: what others wait for has a place before they have
        ends = [pool.submit(evaluate_mini, jobs, stage) for stage in ("short", "long")]
        started: dict[str, Future[None]] = {}
        for run in RUNS:
            started[run.name] = pool.submit(train_and_evaluate, jobs, run, started.get(run.after))
        studied = next(run for run in RUNS if run.name == STUDIED)
        for future in (*ends, *started.values(), pool.submit(study, jobs, studied, started[STUDIED])):
            future.result()
    how = command("benchmarks.extension.run_all", sys.argv[1:] if argv is None else argv)
    print(write_report(jobs.runs, arguments.out, how))


if __name__ == "__main__":
    main()

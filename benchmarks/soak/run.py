"""Disturbs training jobs on a real Slurm at random times and counts how many end with the same bits."""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from msa_train.training.metrics import read_metrics
from tests.helpers.slurm_cluster import SlurmCluster, powered_on
from tests.helpers.training_command import TINY, last_step, train, write_corpus

ROOT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
TIMES = {"tokens_per_s", "step_time_s", "memory_gib", "exposed_s", "exposed_s_by_purpose"}
DISTURBANCES = ("kill_rank", "power_off", "requeue", "warn")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30, help="of every run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=1e9, help="start no further job after this time")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw, rows, start = random.Random(arguments.seed), [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak_") as name, SlurmCluster() as cluster:
        folder = Path(name)
        write_corpus(folder / "corpus")
        settings = (
            *(*TINY, f"data.corpus={folder / 'corpus'}", f"data.cache_dir={folder / 'cache'}"),
            f"train.steps={arguments.steps}",
        )
        train(*settings, f"run_dir={folder / 'want'}")
        want = comparable(folder / "want")
        while len(rows) < arguments.kills and time.monotonic() - start < arguments.limit_s:
            run_dir = folder / f"run{len(rows)}"
            row = disturb(cluster, settings, run_dir, draw, arguments.steps)
            row["bit_equal"] = row["state"] == "COMPLETED" and comparable(run_dir) == want
            rows.append(row)
            print(json.dumps(row), flush=True)
            arguments.out.write_text(json.dumps(result(rows, arguments), indent=1) + "\n")


def disturb(
    cluster: SlurmCluster, settings: tuple[str, ...], run_dir: Path, draw: random.Random, steps: int
) -> dict[str, Any]:
    """Train one job to its end, disturbed once."""
    kind = draw.choice(DISTURBANCES)
    after_step, pause_s = draw.randrange(1, steps - 5), draw.uniform(0, 0.5)
    environ = {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "launchers.submit", "cluster=local_cpu", "nodes=2", "time=60", *settings]
    command += [f"run_dir={run_dir}", "cluster.tasks=gpu", "cluster.workers_per_node=1"]
    begin = time.monotonic()
    job = cluster.run(*command, environ=environ, timeout=600).rpartition("job ")[2]

    def over() -> bool:
        return cluster.job(job)["JobState"] in ENDED

    cluster.wait(lambda: last_step(run_dir) >= after_step or over(), f"step {after_step}", 1800)
    time.sleep(pause_s)
    row = {"kind": kind, "after_step": after_step, "pause_s": round(pause_s, 3)}
    with ExitStack() as stack:
        if not over():
            row["disturbed_at_step"] = last_step(run_dir)
            victim = strike(cluster, job, kind, draw)
            if kind == "power_off":
                stack.enter_context(powered_on(cluster, victim))
            row["victim"] = victim
        cluster.wait(over, f"end of job {job}", 1800)
        fields = cluster.job(job)
    cluster.wait_idle()
    return row | {
        "state": fields["JobState"],
        "restarts": int(fields["Restarts"]),
        "seconds": round(time.monotonic() - begin, 1),
    }


def strike(cluster: SlurmCluster, job: str, kind: str, draw: random.Random) -> str:
    """Do the harm; returns whom it hit."""
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    node = draw.choice(nodes)
    if kind == "power_off":
        cluster.power_off(node)
    elif kind == "kill_rank":
        for process in cluster.processes(node):
            if "launchers.train" in process.cmdline():
                process.send_signal(signal.SIGKILL)
                break
    elif kind == "requeue":
        cluster.run("scontrol", "requeue", job, check=False)
    else:
        cluster.run("scancel", "--batch", "--signal=USR1", job, check=False)
    return node


def comparable(run_dir: Path) -> list[dict[str, Any]]:
    """All metrics but times and memory."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run_dir)]


def result(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Content of the JSON file."""
    equal = Counter(row["kind"] for row in rows if row["bit_equal"])
    return {
        "command": " ".join(["python -m benchmarks.soak.run", *sys.argv[1:]]),
        "machine": machine(),
        "seed": arguments.seed,
        "jobs": len(rows),
        "bit_equal": sum(equal.values()),
        "by_kind": {
            kind: {"jobs": sum(row["kind"] == kind for row in rows), "bit_equal": equal[kind]}
            for kind in DISTURBANCES
        },
        "runs": rows,
    }


if __name__ == "__main__":
    main()

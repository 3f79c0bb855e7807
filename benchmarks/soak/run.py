"""Disturb training jobs on a real Slurm at random times and count how many end with the same bits."""

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import command, machine
from msa_train.training.metrics.writer import read_metrics
from tests.helpers.slurm_cluster import SlurmCluster, ended, powered_on
from tests.helpers.training_command import TINY, last_step, train, without_times, write_corpus

ROOT = Path(__file__).parents[2]


class Disturbance(StrEnum):
    """Name what is done to a job."""

    kill_rank = "kill_rank"
    hang_rank = "hang_rank"
    "stopped, not ended: only the watchdog notices"
    power_off = "power_off"
    unplug = "unplug"
    "the processes of a node live on, unheard"
    requeue = "requeue"
    warn = "warn"
    "that its time is nearly up"


# what starts the workers on a node: Slurm itself, or torch's agent
TASKS = ("gpu", "node")
WATCHDOG_S = 20
IDLE_WITHIN_S = 300


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
            kind = list(Disturbance)[len(rows) % len(Disturbance)]
            row = disturb(cluster, settings, run_dir, kind, draw, arguments.steps)
            row["bit_equal"] = row["state"] == "COMPLETED" and comparable(run_dir) == want
            rows.append(row)
            print(json.dumps(row), flush=True)
            report = result(rows, arguments)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
            arguments.out.with_suffix(".md").write_text(table(report))


def disturb(
    cluster: SlurmCluster,
    settings: tuple[str, ...],
    run_dir: Path,
    kind: Disturbance,
    draw: random.Random,
    steps: int,
) -> dict[str, Any]:
    """Train one job to its end, disturbed once."""
    tasks = draw.choice(TASKS)
    after_step, pause_s = draw.randrange(1, steps - 5), draw.uniform(0, 0.5)
    environ = {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "TORCHDYNAMO_DISABLE": "1"}
    submit = [sys.executable, "-m", "launchers.submit", "cluster=local_cpu", "nodes=2", "time=60", *settings]
    submit += [f"run_dir={run_dir}", f"cluster.tasks={tasks}", "cluster.workers_per_node=1"]
    submit.append(f"watchdog.timeout_s={WATCHDOG_S}")
    begin = time.monotonic()
    job = cluster.run(*submit, environ=environ, timeout=600).rpartition("job ")[2]

    def over() -> bool:
        return ended(cluster.job(job))

    cluster.wait(lambda: last_step(run_dir) >= after_step or over(), f"step {after_step}", 1800)
    time.sleep(pause_s)
    row: dict[str, Any] = {
        "kind": kind.value,
        "tasks": tasks,
        "after_step": after_step,
        "pause_s": round(pause_s, 3),
    }
    with ExitStack() as stack:
        if not over():
            row["disturbed_at_step"] = last_step(run_dir)
            victim = row["victim"] = draw.choice(nodes_of(cluster, job))
            strike(cluster, job, kind, victim)
            if kind is Disturbance.power_off:
                stack.enter_context(powered_on(cluster, victim))
            elif kind is Disturbance.unplug:
                stack.callback(cluster.plug, victim)
        cluster.wait(over, f"end of job {job}", 1800)
        fields = cluster.job(job)
    make_idle(cluster)
    return row | {
        "state": fields["JobState"],
        "restarts": int(fields["Restarts"]),
        "seconds": round(time.monotonic() - begin, 1),
    }


def nodes_of(cluster: SlurmCluster, job: str) -> list[str]:
    """List the host names."""
    return cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()


def make_idle(cluster: SlurmCluster) -> None:
    """Wait until all nodes are ready for the next job. Slurm drains one whose processes lived on unheard."""

    def idle() -> bool:
        states = cluster.run("sinfo", "-h", "-N", "-p", "train", "-o", "%N %t", check=False).split()
        nodes = dict(zip(states[::2], states[1::2], strict=True))
        for node in [node for node, state in nodes.items() if state.startswith("drain")]:
            cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        return bool(nodes) and set(nodes.values()) == {"idle"}

    cluster.wait(idle, "all nodes idle", IDLE_WITHIN_S)


def strike(cluster: SlurmCluster, job: str, kind: Disturbance, node: str) -> None:
    """Do the harm."""
    if kind is Disturbance.power_off:
        cluster.power_off(node)
    elif kind is Disturbance.unplug:
        cluster.unplug(node)
    elif kind is Disturbance.requeue:
        cluster.run("scontrol", "requeue", job, check=False)
    elif kind is Disturbance.warn:
        cluster.run("scancel", "--batch", "--signal=USR1", job, check=False)
    else:
        number = signal.SIGKILL if kind is Disturbance.kill_rank else signal.SIGSTOP
        for process in ranks(cluster.processes(node)):
            process.send_signal(number)


def ranks(processes: list[psutil.Process]) -> list[psutil.Process]:
    """List the processes that train, not what started them."""
    found: dict[str, list[psutil.Process]] = {"launchers.worker": [], "launchers.train": []}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            for module in found:
                # the name alone is a word also of srun's command line; workers are started by `-P -c CODE`
                started = words[1:3] == ["-m", module] or (words[1:3] == ["-P", "-c"] and module in words[3])
                if started:
                    found[module].append(process)
    return found["launchers.worker"] or found["launchers.train"]


def comparable(run_dir: Path) -> list[dict[str, Any]]:
    """Keep all metrics but times and memory."""
    return [without_times(row) for row in read_metrics(run_dir)]


def table(report: dict[str, Any]) -> str:
    """Write the table as Markdown."""
    lines = [
        f"`{report['command']}`, {report['machine']['cpu']}, commit {report['machine']['commit']}",
        "",
        "| disturbed by | jobs | ended with the same bits | restarts | longest, s |",
        "|---|---|---|---|---|",
    ]
    for kind, count in report["by_kind"].items():
        runs = [run for run in report["runs"] if run["kind"] == kind]
        restarts = sum(run["restarts"] for run in runs)
        longest = max((run["seconds"] for run in runs), default=0)
        lines.append(f"| {kind} | {count['jobs']} | {count['bit_equal']} | {restarts} | {longest:g} |")
    lines.append(f"| all | {report['jobs']} | {report['bit_equal']} | | |")
    return "\n".join(lines) + "\n"


def result(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Collect the content of the JSON file."""
    equal = Counter(row["kind"] for row in rows if row["bit_equal"])
    return {
        "command": command("benchmarks.soak.run", sys.argv[1:]),
        "machine": machine(),
        "seed": arguments.seed,
        "jobs": len(rows),
        "bit_equal": sum(equal.values()),
        "by_kind": {
            kind: {"jobs": sum(row["kind"] == kind for row in rows), "bit_equal": equal[kind]}
            for kind in map(str, Disturbance)
        },
        "runs": rows,
    }


if __name__ == "__main__":
    main()

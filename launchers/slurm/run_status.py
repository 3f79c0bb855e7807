"""Read how far a run is from its files and from Slurm.

Nobody asks the workers: rank 0 writes metrics.jsonl whatever the number of ranks, and its last 256 KiB are
read. Slurm is asked once for a job that waits or runs, up to three times for one that has ended. So it costs
as much on 32 nodes as on one, and may be repeated every minute by `watch`.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from launchers.hydra_config.compose import load_run
from launchers.local.run_dir import CONFIG_NAME
from launchers.slurm.jobs import FOLDER, ask_slurm, is_job, submitted_job
from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import plan_stages, total_steps
from msa_train.config.text import excerpt
from msa_train.runtime.preemption import read_stopped
from msa_train.runtime.untrusted_files import open_regular
from msa_train.training.metrics.writer import METRICS_NAME

# read of metrics.jsonl and starts.tsv, from their ends
TAIL_BYTES = 2**18


# keys and types of those entries of metrics.jsonl that tell of a step
_OF_A_STEP = {
    "step": (int,),
    "lm_loss": (int, float, type(None)),
    "tokens_per_s": (int, float),
    "step_time_s": (int, float),
}


def read_status(run_dir: Path) -> dict[str, Any]:
    """Collect what is known about a run; keys that do not apply are absent.

    Returns:
        run_dir; job, state, reason, nodes, job_left_s; step, total_steps, stage, lm_loss, tokens_per_s, age_s
        of the last entry, train_left_s; checkpoint, checkpoint_age_s; restarts, stopped. Those in _s are
        seconds.

    Raises:
        ValueError: if run_dir is no folder of a run.
    """
    if not run_dir.is_dir() or not any((run_dir / name).exists() for name in (CONFIG_NAME, FOLDER)):
        raise ValueError(
            f"run_dir={run_dir}: is no folder of a run; name one that msa-train or msa-submit made"
        )
    status: dict[str, Any] = {"run_dir": str(run_dir)}
    status |= _job(run_dir) | _progress(run_dir) | _checkpoint(run_dir)
    starts = _starts(run_dir)
    if starts:
        status["restarts"] = len(starts) - 1
    stopped = read_stopped(run_dir)
    if stopped is not None:
        status["stopped"] = f"by {stopped.signal} after step {stopped.step}"
    return status


def _job(run_dir: Path) -> dict[str, Any]:
    """Read the state of the last submission, as Slurm knows it now.

    squeue knows jobs that wait or run, sacct those that ended, where there is accounting; scontrol remembers
    them for some minutes where there is none.
    """
    starts = _starts(run_dir)
    job = submitted_job(run_dir) or (starts[-1][1] if starts else "")
    if not job:
        return {}
    text = ask_slurm("squeue", "--noheader", "--jobs", job, "--format=%T|%r|%N|%L")
    if text:
        state, reason, nodes, left = text.splitlines()[0].split("|")
        found: dict[str, Any] = {"job": job, "state": state}
        if reason != "None":
            found["reason"] = reason
        if nodes:
            found["nodes"] = nodes
        seconds = _seconds(left)
        return found | ({} if seconds is None else {"job_left_s": seconds})
    for command in (
        ("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job, "--format=State"),
        ("scontrol", "show", "job", "--oneliner", job),
    ):
        words = (ask_slurm(*command) or "").split()
        states = [word.removeprefix("JobState=") for word in words if word.startswith("JobState=")]
        if words and (states or command[0] == "sacct"):
            return {"job": job, "state": (states or words)[0]}
    return {"job": job, "state": "unknown to Slurm"}


def _progress(run_dir: Path) -> dict[str, Any]:
    """Read step, loss and speed of the last entry; the time left is by the median of the last steps."""
    config_path, metrics = run_dir / CONFIG_NAME, run_dir / METRICS_NAME
    if not config_path.exists() or not metrics.exists():
        return {}
    config, rows = load_run(config_path), _last_rows(metrics)
    if not rows:
        return {}
    last, total, stages = rows[-1], total_steps(config), plan_stages(config)
    stage = last.get("stage", 0)
    # the configuration may be newer than the metrics, after a start with other stages
    if type(stage) is not int or not 0 <= stage < len(stages):
        raise ValueError(
            f"{metrics}: is of stage {excerpt(str(stage))}, {config_path} has {len(stages)} of them; name a "
            "run whose files belong together"
        )
    found: dict[str, Any] = {
        "step": last["step"],
        "total_steps": total,
        "lm_loss": last["lm_loss"],
        "tokens_per_s": last["tokens_per_s"],
        "age_s": time.time() - metrics.stat().st_mtime,
        "stage": stages[stage].name,
    }
    if last["step"] < total:
        # the median, as the first step of a start and those that save take far longer
        times = sorted(row["step_time_s"] for row in rows)
        found["train_left_s"] = (total - last["step"]) * times[len(times) // 2]
    return found


def _checkpoint(run_dir: Path) -> dict[str, Any]:
    """Find the newest checkpoint and its age."""
    store = CheckpointStore(run_dir)
    steps = store.steps()
    if not steps:
        return {}
    return {
        "checkpoint": steps[-1],
        "checkpoint_age_s": time.time() - store.path(steps[-1]).stat().st_mtime,
    }


def _starts(run_dir: Path) -> list[list[str]]:
    """Read the lines of starts.tsv that belong to the last job: time, job, start, step, nodes.

    The batch script writes one at every start, so there is one more than there were restarts.
    """
    path = run_dir / FOLDER / "starts.tsv"
    if not path.exists():
        return []
    rows = [[excerpt(part) for part in line.split("\t")] for line in _tail(path).splitlines()]
    # others can write there too, and what is shown goes to a terminal and to squeue
    rows = [row for row in rows if len(row) == 5 and is_job(row[1])]
    return [row for row in rows if row[1] == rows[-1][1]]


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """Read the last entries of metrics.jsonl that have a loss, without reading all of a long run."""
    rows = []
    for line in _tail(path).split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            # cut short by a kill
            continue
        if (
            isinstance(row, dict)
            and "lm_loss" in row
            and all(type(row.get(name)) in kinds for name, kinds in _OF_A_STEP.items())
        ):
            rows.append(row)
    return rows


def _tail(path: Path) -> str:
    """Read the last whole lines of a file that grows.

    The cut at TAIL_BYTES falls somewhere into a line, the first one read, which is dropped.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL_BYTES, 0))
            text = file.read(TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); remove it") from None
    return text.partition("\n")[2] if size > TAIL_BYTES else text


def _seconds(text: str) -> int | None:
    """Read Slurm's time left in seconds; None for UNLIMITED or INVALID.

    Example: "1-02:03:04" -> 86400 + 2 * 3600 + 3 * 60 + 4 = 93784; "3:04" -> 184.
    """
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts) or (days and not days.isdecimal()):
        return None
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return int(days or 0) * 86400 + seconds

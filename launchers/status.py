"""The msa-status command: how far a run is, from its files and from Slurm."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.command_line import Parser, run_command
from launchers.compose import load_run
from launchers.output import say
from launchers.run_dir import CONFIG_NAME
from launchers.slurm_jobs import FOLDER, ask_slurm, is_job, submitted_job
from msa_train.config import plan_stages, total_steps
from msa_train.config.text import excerpt
from msa_train.foreign_files import open_regular
from msa_train.training.checkpoint_store import CheckpointStore
from msa_train.training.metrics import METRICS_NAME
from msa_train.training.progress import format_count, format_duration
from msa_train.training.stop import read_stopped
from msa_train.training.summary import format_table

DESCRIPTION = "Prints how far a run is: its Slurm job, step, loss, speed, time left, checkpoints, restarts."
TAIL_BYTES = 2**18
# of entries of metrics.jsonl that tell of a step
_OF_A_STEP = {
    "step": (int,),
    "lm_loss": (int, float, type(None)),
    "tokens_per_s": (int, float),
    "step_time_s": (int, float),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        Exit code: 0, 2 for bad input, 130 if interrupted.
    """

    def run() -> None:
        parser = Parser(prog="msa-status", description=DESCRIPTION)
        parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run")
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
        arguments = parser.parse_args(argv)
        status = read_status(arguments.run_dir)
        say(json.dumps(status, indent=1) if arguments.json else format_status(status), lines=True)

    return run_command("msa-status", run)


def read_status(run_dir: Path) -> dict[str, Any]:
    """What is known about a run; keys that do not apply are absent.

    Returns:
        run_dir, job, state, reason, nodes, time_left_s of the job; step, total_steps, lm_loss, tokens_per_s,
        age_s of the last entry, train_left_s; checkpoint and its age_s; restarts.

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


def format_status(status: dict[str, Any]) -> str:
    """The same as a table."""
    rows = [("run", status["run_dir"])]
    if "job" in status:
        where = f" on {status['nodes']}" if status.get("nodes") else ""
        why = f" ({status['reason']})" if status.get("reason") else ""
        rows.append(("job", f"{status['job']}: {status['state']}{why}{where}"))
    if "job_left_s" in status:
        rows.append(("time left to the job", format_duration(status["job_left_s"])))
    if "step" in status:
        rows.append(("step", f"{status['step']} of {status['total_steps']}, {_ago(status['age_s'])}"))
        rows.append(("loss", f"{status['lm_loss']:.4g}"))
        rows.append(("speed", f"{format_count(status['tokens_per_s'])} tokens/s"))
    if "train_left_s" in status:
        rows.append(("left to train", format_duration(status["train_left_s"])))
    if "checkpoint" in status:
        rows.append(("last checkpoint", f"step {status['checkpoint']}, {_ago(status['checkpoint_age_s'])}"))
    else:
        rows.append(("last checkpoint", "none"))
    if "restarts" in status:
        rows.append(("restarts", str(status["restarts"])))
    if "stopped" in status:
        rows.append(("stopped", status["stopped"]))
    return format_table(rows)


def _job(run_dir: Path) -> dict[str, Any]:
    """Of the last submission, as Slurm knows it now."""
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
    config_path, metrics = run_dir / CONFIG_NAME, run_dir / METRICS_NAME
    if not config_path.exists() or not metrics.exists():
        return {}
    config, rows = load_run(config_path), _last_rows(metrics)
    if not rows:
        return {}
    last, total, stages = rows[-1], total_steps(config), plan_stages(config)
    stage = last.get("stage", 0)
    if type(stage) is not int or not 0 <= stage < len(stages):
        raise ValueError(
            f"{metrics}: is of stage {excerpt(str(stage))}, {config_path} has {len(stages)} of them; name a "
            "run whose files belong together"
        )
    found: dict[str, Any] = {
        "step": last["step"],
        "total_steps": total,
        "lm_loss": last["lm_loss"] if last["lm_loss"] is not None else float("nan"),
        "tokens_per_s": last["tokens_per_s"],
        "age_s": time.time() - metrics.stat().st_mtime,
        "stage": stages[stage].name,
    }
    if last["step"] < total:
        times = sorted(row["step_time_s"] for row in rows)
        found["train_left_s"] = (total - last["step"]) * times[len(times) // 2]
    return found


def _checkpoint(run_dir: Path) -> dict[str, Any]:
    store = CheckpointStore(run_dir)
    steps = store.steps()
    if not steps:
        return {}
    return {
        "checkpoint": steps[-1],
        "checkpoint_age_s": time.time() - store.path(steps[-1]).stat().st_mtime,
    }


def _starts(run_dir: Path) -> list[list[str]]:
    """Lines of starts.tsv that belong to the last job: time, job, start, step, nodes."""
    path = run_dir / FOLDER / "starts.tsv"
    if not path.exists():
        return []
    rows = [[excerpt(part) for part in line.split("\t")] for line in _tail(path).splitlines()]
    rows = [row for row in rows if len(row) == 5 and is_job(row[1])]
    return [row for row in rows if row[1] == rows[-1][1]]


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The last entries of metrics.jsonl that have a loss, without reading all of a long run."""
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
    """The last whole lines of a file that grows."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL_BYTES, 0))
            text = file.read(TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); remove it") from None
    return text.partition("\n")[2] if size > TAIL_BYTES else text


def _seconds(text: str) -> int | None:
    """Slurm's time left: 1-02:03:04, 3:04; None for UNLIMITED or INVALID."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts) or (days and not days.isdecimal()):
        return None
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return int(days or 0) * 86400 + seconds


def _ago(seconds: float) -> str:
    return f"{format_duration(max(seconds, 0))} ago"


if __name__ == "__main__":
    sys.exit(main())

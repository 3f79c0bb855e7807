"""Run msa-status: tell how far a run is, from its files and from Slurm.

It asks no worker, so its cost does not grow with the ranks, and a hung run answers as well as a healthy one.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.cli.command_line import Parser, run_command
from launchers.cli.output import say
from launchers.slurm.run_status import read_status
from msa_train.training.metrics.progress import format_count, format_duration
from msa_train.training.metrics.tables import format_table

DESCRIPTION = "Prints how far a run is: its Slurm job, step, loss, speed, time left, checkpoints, restarts."


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
        # one dictionary for both, so that scripts and users see the same figures
        status = read_status(arguments.run_dir)
        say(json.dumps(status, indent=1) if arguments.json else format_status(status), lines=True)

    return run_command("msa-status", run)


def format_status(status: dict[str, Any]) -> str:
    """Write the status as a table.

    Args:
        status: as `read_status` returns it.

    Example: {"run_dir": "runs/demo"} -> rows "run  runs/demo" and "last checkpoint  none".
    """
    rows = [("run", status["run_dir"])]
    if "job" in status:
        where = f" on {status['nodes']}" if status.get("nodes") else ""
        why = f" ({status['reason']})" if status.get("reason") else ""
        rows.append(("job", f"{status['job']}: {status['state']}{why}{where}"))
    if "job_left_s" in status:
        rows.append(("time left to the job", format_duration(status["job_left_s"])))
    if "step" in status:
        rows.append(("step", f"{status['step']} of {status['total_steps']}, {_ago(status['age_s'])}"))
        # metrics.jsonl has null for what is not finite
        loss = status["lm_loss"]
        rows.append(("loss", "not finite" if loss is None else f"{loss:.4g}"))
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


def _ago(seconds: float) -> str:
    """Write an age; a file from a node whose clock is ahead is of now."""
    return f"{format_duration(max(seconds, 0))} ago"


if __name__ == "__main__":
    sys.exit(main())

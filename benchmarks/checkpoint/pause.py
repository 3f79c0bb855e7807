"""Measure how long training stands still for a checkpoint: written beside it, and waited for.

    python -m benchmarks.checkpoint.pause --out benchmarks/results

Trains a model of 25 million parameters (100 MB in fp32, 400 MB with optimizer) on one process, in turns
with checkpoint.asynchronous=true, =false and none. Pause and write time are those that metrics.jsonl
has. The first pause of a start is told apart: memory for the copy is made then. Writes checkpoint_pause.json
and checkpoint_pause.md: command, commit, hardware, figures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, command, machine
from msa_train.training.metrics.writer import read_metrics

STEPS, EVERY = 13, 3
MODEL = (
    "run=smoke",
    "model.num_layers=2",
    "model.hidden_size=512",
    "model.vocab_size=20480",
    "model.num_heads=8",
    "model.num_kv_heads=2",
    "model.head_dim=64",
    "model.ffn_hidden_size=1024",
    "model.moe_ffn_hidden_size=128",
    "model.shared_expert_hidden_size=128",
    "data.seq_len=256",
    "launcher.num_processes=1",
    "parallel.cp_size=1",
    "parallel.ep_size=1",
    "train.global_batch_size=1",
    "train.validate_every=0",
    "logging.attention_every=0",
    "logging.tensorboard=false",
    "checkpoint.keep_last=1",
    f"train.steps={STEPS}",
)
MODES = {
    "asynchronous": (f"checkpoint.every={EVERY}", "checkpoint.asynchronous=true"),
    "synchronous": (f"checkpoint.every={EVERY}", "checkpoint.asynchronous=false"),
    "none": ("checkpoint.every=0",),
}


def train(run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    """Run msa-train; returns metrics.jsonl."""
    command = [sys.executable, "-m", "launchers.train", *MODEL, f"run_dir={run_dir}", *overrides]
    folders = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    subprocess.run(command, check=True, cwd=ROOT, env=environ, stdout=sys.stderr)
    return read_metrics(run_dir)


def figures(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Collect the seconds over all runs of one mode."""
    saves = [[row for row in rows if "checkpoint_step" in row] for rows in runs]
    later = [row for run in saves for row in run[1:]]
    # a step after the first save in which nothing but steps and, if asynchronous, writing went on
    steps = [row["step_time_s"] for rows in runs for row in rows[EVERY:]]
    result: dict[str, Any] = {"step_s_median": statistics.median(steps), "step_s_max": max(steps)}
    if later:
        result |= {
            "bytes": later[0]["checkpoint_bytes"],
            "saves": len(later),
            "first_pause_s": [run[0]["checkpoint_pause_s"] for run in saves],
            "pause_s_median": statistics.median(row["checkpoint_pause_s"] for row in later),
            "pause_s_max": max(row["checkpoint_pause_s"] for row in later),
            "write_s_median": statistics.median(row["checkpoint_write_s"] for row in later),
        }
    return result


def markdown(result: dict[str, Any]) -> str:
    """Write the figures as a table."""
    where = result["machine"]
    lines = [
        "# Pause of training for a checkpoint",
        "",
        f"`{result['command']}`, commit {where['commit']}, {where['cores']} cores of {where['cpu']}, Python "
        f"{where['python']}; one process with one thread, "
        f"{result['modes']['synchronous']['bytes'] / 1e6:.0f} MB per checkpoint. {result['note']}".rstrip(),
        "",
        "| checkpoints | saves | pause, median (max) | first pause of each start | written in, median "
        "| step, median (max) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["modes"].items():
        step = f"{row['step_s_median']:.2f} s ({row['step_s_max']:.2f} s)"
        if "saves" not in row:
            lines.append(f"| {name} | 0 | | | | {step} |")
            continue
        first = ", ".join(f"{seconds:.2f} s" for seconds in row["first_pause_s"])
        lines.append(
            f"| {name} | {row['saves']} | {row['pause_s_median']:.3f} s ({row['pause_s_max']:.3f} s) "
            f"| {first} | {row['write_s_median']:.2f} s | {step} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rounds", type=int, default=2, help="turns of the three modes")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    arguments = parser.parse_args()
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in MODES}
    for number in range(arguments.rounds):
        for name, overrides in MODES.items():
            with tempfile.TemporaryDirectory() as folder:
                runs[name].append(train(Path(folder) / f"{name}_{number}", *overrides))
    result = {
        "command": command("benchmarks.checkpoint.pause", sys.argv[1:]),
        "note": arguments.note,
        "machine": machine(),
        "overrides": MODEL,
        "modes": {name: figures(rows) for name, rows in runs.items()},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "checkpoint_pause.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "checkpoint_pause.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()

"""Measure the demo: losses and bytes of a whole run, then step times of the three exchanges, paired.

    python -m benchmarks.demo.run_demo --out benchmarks/results

Trains run=demo with `selected` to its end, then a few steps of each exchange in turn, several rounds, so that
noise of the machine hits all alike. Writes demo.json and demo.md: command, commit, hardware, shapes, figures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, command, machine
from msa_train.training.metrics.writer import read_metrics

EXCHANGES = ("selected", "all_gather", "ring")
WARM_UP_STEPS = 2


def train(run_dir: Path, *overrides: str) -> float:
    """Run msa-train; returns wall seconds."""
    arguments = [sys.executable, "-m", "launchers.train", "run=demo", f"run_dir={run_dir}", *overrides]
    folders = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    start = time.perf_counter()
    subprocess.run(arguments, check=True, cwd=ROOT, env=environ, stdout=sys.stderr)
    return time.perf_counter() - start


def whole_run(folder: Path, trained: Path | None) -> dict[str, Any]:
    """Run the demo from start to end with its own settings, or one that was run before."""
    run_dir = folder / "whole"
    if trained is not None:
        run_dir.symlink_to(trained.resolve())
        return figures_of(run_dir, None)
    return figures_of(run_dir, train(run_dir))


def figures_of(run_dir: Path, wall_s: float | None) -> dict[str, Any]:
    """Collect the figures of a finished run; wall_s: seconds of the whole command where it was timed."""
    rows = read_metrics(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    validations = [(row["step"], row["val_bits_per_byte"]) for row in rows if "val_bits_per_byte" in row]
    return {
        "wall_s": wall_s,
        "training_s": summary["seconds_this_start"],
        "steps": summary["steps"],
        "lm_loss_first": rows[0]["lm_loss"],
        "lm_loss_last": rows[-1]["lm_loss"],
        "kl_loss_first": rows[0]["kl_loss"],
        "kl_loss_last": rows[-1]["kl_loss"],
        "val_bits_per_byte": validations,
        "f": [(row["step"], row["kv_selected_fraction"]) for row in rows if row["step"] in (1, len(rows))],
        "kv_bytes": sum(row["kv_bytes"] for row in rows),
        "kv_bytes_all_gather": sum(row["kv_bytes_all_gather"] for row in rows),
        "kv_grad_bytes": sum(row["kv_grad_bytes"] for row in rows),
        "index_key_bytes": sum(row["index_key_bytes"] for row in rows),
        "tokens_per_s_median": summary["tokens_per_s_median"],
        "memory_gib": summary["memory_gib"],
    }


def paired_steps(folder: Path, *, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Measure the median step time and bytes per step of each exchange, from a trained model's weights."""
    times: dict[str, list[float]] = {name: [] for name in EXCHANGES}
    last: dict[str, dict[str, Any]] = {}
    trained = read_metrics(folder / "whole")[-1]["step"]
    for index in range(rounds):
        for name in EXCHANGES:
            run_dir = folder / f"{name}_{index}"
            train(
                run_dir,
                f"checkpoint.load={folder / 'whole'}",
                f"parallel.kv_exchange={name}",
                f"train.steps={trained + WARM_UP_STEPS + steps}",
                "train.validate_every=0",
                "checkpoint.every=0",
            )
            rows = read_metrics(run_dir)
            times[name] += [row["step_time_s"] for row in rows[WARM_UP_STEPS:]]
            last[name] = rows[-1]
    return {
        name: {
            "step_time_s_median": statistics.median(times[name]),
            "step_time_s_min": min(times[name]),
            "lm_loss": last[name]["lm_loss"],
            "kv_bytes": last[name]["kv_bytes"],
            "kv_backward_bytes": last[name]["kv_grad_bytes"] + last[name].get("kv_again_bytes", 0),
            "index_key_bytes": last[name]["index_key_bytes"],
        }
        for name in EXCHANGES
    }


def markdown(result: dict[str, Any]) -> str:
    """Write the figures as a table."""
    run, pairs, where = result["run"], result["exchanges"], result["machine"]
    lines = [
        "# The demo",
        "",
        f"`{result['command']}`, commit {where['commit']}, {where['cores']} cores of {where['cpu']}, "
        f"Python {where['python']}, fp32, cp 2 x ep 2, 8192 bytes per step.",
        "",
        "| whole run | |",
        "|---|---|",
        f"| steps | {run['steps']} |",
        f"| training time, validation and checkpoints included | {run['training_s']:.0f} s |",
        f"| training loss, nats per byte | {run['lm_loss_first']:.3f} -> {run['lm_loss_last']:.3f} |",
        f"| KL loss | {run['kl_loss_first']:.3f} -> {run['kl_loss_last']:.3f} |",
        "| validation, bits per byte (step) | "
        + ", ".join(f"{value:.3f} ({step})" for step, value in run["val_bits_per_byte"])
        + " |",
        "| f, mean over layers and groups (step) | "
        + ", ".join(f"{value:.3f} ({step})" for step, value in run["f"])
        + " |",
        f"| K/V bytes forward / an all-gather's | {run['kv_bytes']:,} / {run['kv_bytes_all_gather']:,} |",
        f"| bytes of K/V gradients / index keys | {run['kv_grad_bytes']:,} / {run['index_key_bytes']:,} |",
        f"| tokens per second, median | {run['tokens_per_s_median']:,.0f} |",
        f"| memory of the larger process | {run['memory_gib']:.2f} GiB |",
        "",
        "One step of each exchange from the trained weights, taken in turns on one machine, where the wire "
        "is memory: this shows equal losses and the bytes, not the speed that a network would give.",
        "",
        "| exchange | step time, median (min) | K/V bytes forward | K/V + gradient bytes backward | loss |",
        "|---|---|---|---|---|",
    ]
    for name, row in pairs.items():
        lines.append(
            f"| {name} | {row['step_time_s_median']:.2f} s ({row['step_time_s_min']:.2f} s) | "
            f"{row['kv_bytes']:,} | {row['kv_backward_bytes']:,} | {row['lm_loss']:.6f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--trained", type=Path, help="run_dir of a finished run=demo, instead of training")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the three exchanges")
    parser.add_argument("--steps", type=int, default=6, help="timed steps per turn")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "command": command("benchmarks.demo.run_demo", sys.argv[1:]),
            "machine": machine(),
            "run": whole_run(folder, arguments.trained),
            "exchanges": paired_steps(folder, rounds=arguments.rounds, steps=arguments.steps),
        }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "demo.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()

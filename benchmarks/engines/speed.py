"""Compare the engines on the same ranks: step time, memory, bytes over the network, losses; table and JSON.

    python -m benchmarks.engines.speed --out benchmarks/results    # some 15 minutes on 2 cores

Each run is `msa-train` in a network namespace of its own, whose loopback carries all that ranks send to each
other; engines take turns. engine=megatron is left out: Megatron's optimizer and DDP want a GPU, and a CPU in
its place says nothing about time or memory.

Needs Linux and root, or user namespaces.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.exchange.counters import read_counters
from benchmarks.exchange.namespaces import NoNamespacesError, enter_own_network
from benchmarks.machine import ROOT, command, machine
from msa_train.simulate.reports.text import table
from msa_train.training.metrics.writer import read_metrics

ENGINES: dict[str, list[str]] = {
    "torch": ["engine=torch"],
    "deepspeed 0": ["engine=deepspeed", "deepspeed.zero_stage=0"],
    "deepspeed 1": ["engine=deepspeed", "deepspeed.zero_stage=1"],
    "deepspeed 2": ["engine=deepspeed", "deepspeed.zero_stage=2"],
    "deepspeed 3": ["engine=deepspeed", "deepspeed.zero_stage=3"],
}
"settings by name; the number is the ZeRO stage"
RIVAL = "torch"
_WARM_UP_STEPS = 1


@dataclass(slots=True, frozen=True)
class Model:
    """Describe what is trained."""

    settings: list[str]
    "for msa-train"
    without: tuple[str, ...] = ()
    "engines that cannot train it"


_SAME = ["run=demo", "optim.algorithm=adamw", "optim.lr=3e-4", "train.validate_every=0", "checkpoint.every=0"]
_DENSE = [
    *_SAME,
    "model.num_layers=12",
    "model.hidden_size=768",
    "model.num_heads=12",
    "model.num_kv_heads=4",
    "model.head_dim=64",
    "model.rotary_dim=48",
    "model.ffn_hidden_size=3072",
    "model.num_dense_ffn_layers=12",
    "model.init_std=0.02",
    "data.seq_len=1024",
    "attention.block_size=32",
    "attention.window=128",
    "attention.index_head_dim=48",
    "parallel.ep_size=1",
]
MODELS = {
    "demo": Model([*_SAME, "parallel.ep_size=1"]),
    "demo, experts spread": Model(_SAME, without=("deepspeed 3",)),
    "dense 100M": Model(_DENSE),
}
"run=demo with AdamW and every expert on every rank; with experts over the ranks; 12 layers without experts"


def main(argv: list[str] | None = None) -> int:
    """Measure and write.

    Returns:
        0, or 2 after one line on stderr where namespaces are not to be had.
    """
    arguments = _parse(argv)
    if arguments.child is not None:
        return _child(*arguments.child)
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            for ranks in arguments.ranks:
                try:
                    rows += _measure(Path(folder), name, ranks, arguments.rounds, arguments.steps)
                except NoNamespacesError as error:
                    print(f"benchmarks.engines.speed: error: {error}", file=sys.stderr)
                    return 2
    result = {
        "command": command("benchmarks.engines.speed", sys.argv[1:] if argv is None else argv),
        "machine": machine(),
        "seconds": time.perf_counter() - begin,
        "settings": {name: model.settings for name, model in MODELS.items()},
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "engines.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "engines.md").write_text(_page(result))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each engine")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run")
    parser.add_argument("--child", nargs=2, metavar=("RUN_DIR", "JSON"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _measure(folder: Path, name: str, ranks: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Run all engines in turns; a row for each."""
    model = MODELS[name]
    engines = [engine for engine in ENGINES if engine not in model.without]
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for number in range(rounds):
        for engine in engines:
            run_dir = folder / f"{name}_{ranks}_{engine}_{number}".replace(" ", "_").replace(",", "")
            settings = [*model.settings, *ENGINES[engine], *_layout(name, ranks)]
            found = _run(run_dir, [*settings, f"train.steps={_WARM_UP_STEPS + steps}"], ranks)
            runs[engine].append(found)
            print(f"{name}, {ranks} ranks, {engine}: {statistics.median(found['step_s']):.2f} s a step")
    return [_row(name, ranks, engine, found) for engine, found in runs.items()]


def _layout(name: str, ranks: int) -> list[str]:
    spread = "spread" in name
    return [f"parallel.cp_size={ranks}", *([f"parallel.ep_size={ranks}"] if spread else [])]


def _run(run_dir: Path, settings: list[str], ranks: int) -> dict[str, Any]:
    """Train in a process that makes itself a network namespace."""
    arguments = [f"run_dir={run_dir}", f"launcher.num_processes={ranks}", *settings]
    call = [sys.executable, "-m", "benchmarks.engines.speed", "--child", str(run_dir), json.dumps(arguments)]
    folders = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    done = subprocess.run(call, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode == 2 and "namespace" in done.stderr:
        raise NoNamespacesError(done.stderr.strip())
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(settings)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(run_dir: str, arguments: str) -> int:
    """Train, and look at the loopback's counters whenever a step's metrics are there."""
    try:
        enter_own_network()
    except NoNamespacesError as error:
        print(error, file=sys.stderr)
        return 2
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    metrics = Path(run_dir) / "metrics.jsonl"
    seen: list[int] = []
    call = [sys.executable, "-m", "launchers.train", *json.loads(arguments)]
    with subprocess.Popen(call, stdout=sys.stderr) as training:
        while training.poll() is None:
            steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            seen += [read_counters("lo").received_bytes] * (steps - len(seen))
            time.sleep(0.002)
    if training.returncode != 0:
        return training.returncode
    rows = read_metrics(Path(run_dir))
    timed = rows[_WARM_UP_STEPS:]
    print(
        json.dumps(
            {
                "step_s": [row["step_time_s"] for row in timed],
                "memory_gib": rows[-1]["memory_gib"],
                "lm_loss": [row["lm_loss"] for row in rows],
                "grad_norm": [row["grad_norm"] for row in rows],
                "bytes_per_step": (seen[-1] - seen[_WARM_UP_STEPS - 1]) / (len(seen) - _WARM_UP_STEPS),
            }
        )
    )
    return 0


def _row(name: str, ranks: int, engine: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    times = [seconds for run in runs for seconds in run["step_s"]]
    return {
        "model": name,
        "ranks": ranks,
        "engine": engine,
        "step_s_median": statistics.median(times),
        "step_s_min": min(times),
        "memory_gib": max(run["memory_gib"] for run in runs),
        "bytes_per_step": statistics.mean(run["bytes_per_step"] for run in runs),
        "lm_loss": runs[0]["lm_loss"],
        "grad_norm": runs[0]["grad_norm"],
        "runs": runs,
    }


def _page(result: dict[str, Any]) -> str:
    """Write the table; speeds are relative to engine=torch of the same model and ranks."""
    rows: list[list[str]] = []
    rivals = {(row["model"], row["ranks"]): row for row in result["rows"] if row["engine"] == RIVAL}
    for row in result["rows"]:
        rival = rivals[row["model"], row["ranks"]]
        far = max(abs(a - b) for a, b in zip(row["lm_loss"], rival["lm_loss"], strict=True))
        rows.append(
            [
                f"{row['model']}, {row['ranks']}",
                row["engine"],
                f"{row['step_s_median']:.2f}",
                f"{rival['step_s_median'] / row['step_s_median']:.2f}",
                f"{row['memory_gib']:.2f}",
                f"{row['bytes_per_step'] / 2**20:.1f}",
                f"{row['lm_loss'][-1]:.6f}",
                f"{far:.1e}",
            ]
        )
    head = ["model and ranks", "engine", "step s", "speed", "GiB", "MiB a step", "last loss", "loss differs"]
    return (
        "# Engines compared\n\n"
        f"`{result['command']}`, {result['machine']['cpu']}, {result['machine']['cores']} cores, commit "
        f"{result['machine']['commit']}, {result['seconds']:.0f} s. fp32, one thread a rank.\n\n"
        "Step time: median of all timed steps. Speed: relative to `torch` with the same model and ranks. "
        "GiB: resident memory of the largest process. MiB a step: received over the loopback of a network "
        "namespace by all ranks together, attention's exchange included. Loss differs: the most over "
        f"all steps against `{RIVAL}`. engine=megatron needs GPUs and is not here.\n\n"
        + "\n".join(table([head, *rows]))
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())

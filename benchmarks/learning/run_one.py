"""Train one variant of the learning benchmark with one seed, in one process on one core.

    python -m benchmarks.learning.run_one --variant msa --seed 1 --out runs/learning

Appends a JSON object to OUT/VARIANT_SEED.jsonl at every measurement: settings first, then figures of held-out
packs (see measure.py), tokens, seconds and CPU seconds of training, measurements not counted.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

# Megatron compiles small functions on their first call, which helps nothing here.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
import torch.distributed as dist

from benchmarks.learning.measure import Meter
from benchmarks.learning.recipe import EVAL_STAGE, SEQ_LEN, STEPS, SYMBOLS, Variant, run_config, task_stages
from benchmarks.learning.retrieval_task import RetrievalTask
from benchmarks.machine import machine
from msa_train.config import RunConfig, plan_stages, stage_at
from msa_train.config.lr_schedule import stage_rates
from msa_train.data import load_datasets
from msa_train.parallel.process_groups import build_groups, destroy_groups
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.step_batch import make_batch

EVAL_SEED = 2**31
"held-out packs are the same for all seeds"


def build_tasks(config: RunConfig, seed: int) -> tuple[RetrievalTask, RetrievalTask]:
    """Make packs to train on, and packs from held-out text."""
    train, held_out, _ = load_datasets(
        config.data, block_size=config.attention.block_size, vocab_size=config.model.vocab_size
    )
    assert held_out is not None, "the corpus has more than one document"
    stages = task_stages(config.train.steps)
    return (
        RetrievalTask(train.view, SEQ_LEN, stages, seed, SYMBOLS),
        RetrievalTask(held_out.view, SEQ_LEN, [EVAL_STAGE], EVAL_SEED, SYMBOLS),
    )


@dataclass(kw_only=True, slots=True)
class Measuring:
    """Say how often is measured, and on how many held-out packs."""

    every: int
    "steps between two measurements"
    packs: int
    "held-out packs of each"
    final_packs: int
    "held-out packs after the last step"


def train(config: RunConfig, seed: int, *, stop: int, measuring: Measuring, out: TextIO) -> None:
    """Make `stop` steps of the run, and measure on the way and at the end."""
    groups = build_groups(config.parallel, device=torch.device("cpu"))
    engine = TorchEngine(config, groups)
    task, held_out = build_tasks(config, seed)
    meter, since = Meter(engine, SYMBOLS), _SinceLast()
    spent = _Clock()
    for step in range(stop):
        with spent:
            _train_step(engine, task, step, since)
        done = step + 1
        if done % measuring.every and done != stop:
            continue
        packs = [held_out[i] for i in range(measuring.final_packs if done == stop else measuring.packs)]
        row: dict[str, Any] = {
            "step": done,
            "tokens": done * SEQ_LEN,
            "train_s": round(spent.wall_s, 1),
            "cpu_s": round(spent.cpu_s, 1),
            "stage": engine.stage.name,
            **since.means(),
            **meter.measure(packs),
        }
        since = _SinceLast()
        print(json.dumps(row), file=out, flush=True)
        print(line_of(row), flush=True)


def _train_step(engine: TorchEngine, task: RetrievalTask, step: int, since: "_SinceLast") -> None:
    config = engine.config
    stage = stage_at(plan_stages(config), step)
    if stage != engine.stage:
        engine.set_stage(stage)
    batch = make_batch([task[step].pack], engine.groups)
    result = engine.train_step(batch, stage_rates(step, config.optim, stage, config.train.steps))
    since.losses.append(result.lm_loss_sum / batch.num_labels)
    queries = batch.num_tokens * config.model.num_kv_heads
    since.kl.append({layer: float(value) / queries for layer, value in result.stats.kl.items()})


@dataclass(slots=True)
class _SinceLast:
    """Keep the losses of the steps since the last measurement; KL per query, group and layer, in nats."""

    losses: list[float] = field(default_factory=list)
    kl: list[dict[int, float]] = field(default_factory=list)

    def means(self) -> dict[str, Any]:
        steps = [kl for kl in self.kl if kl]
        layers = steps[0] if steps else {}
        return {
            "train_loss": sum(self.losses) / len(self.losses),
            "kl": {layer: sum(kl[layer] for kl in steps) / len(steps) for layer in layers},
        }


class _Clock:
    """Count wall and CPU seconds spent inside its blocks."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0

    def __enter__(self) -> None:
        self.wall_s -= time.perf_counter()
        self.cpu_s -= time.process_time()

    def __exit__(self, *_error: object) -> None:
        self.wall_s += time.perf_counter()
        self.cpu_s += time.process_time()


def line_of(row: dict[str, Any]) -> str:
    """Write a measurement in one line."""
    accuracies = [bucket["accuracy"] for bucket in row["by_distance"]]
    by_distance = " ".join("--" if a is None else f"{a:.2f}" for a in accuracies)
    recall = " ".join(
        f"L{n} {v['block_recall_text']:.2f}/{v['block_recall_query']:.2f} "
        f"{v['score_recall_text']:.2f}/{v['score_recall_query']:.2f}"
        for n, v in row["layers"].items()
    )
    kl = " ".join(f"{v:.2f}" for v in row["kl"].values())
    return (
        f"{row['step']:5d} {row['tokens'] / 1e6:.2f}M {row['train_s']:.0f}s (cpu {row['cpu_s']:.0f}) "
        f"train {row['train_loss']:.3f} text {row['text_loss']:.4f} "
        f"lookup {row['lookup_loss']:.3f} accuracy {row['accuracy']:.3f} ({by_distance}) "
        f"kl {kl} recall {recall}"
    )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=[v.value for v in Variant], required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="length of the schedule")
    parser.add_argument("--stop", type=int, default=0, help="steps to make of it; 0: all")
    parser.add_argument("--every", type=int, default=50, help="steps between measurements")
    parser.add_argument("--packs", type=int, default=4, help="held-out packs of a measurement")
    parser.add_argument("--final-packs", type=int, default=48, help="the same after the last step")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = run_config(Variant(args.variant), seed=args.seed, steps=args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, (args.out / f"{args.variant}_{args.seed}.jsonl").open("w") as out:
        dist.init_process_group("gloo", init_method=f"file://{folder}/world", rank=0, world_size=1)
        head = {"variant": args.variant, "seed": args.seed, "steps": args.steps, **machine()}
        print(json.dumps(head), file=out)
        measuring = Measuring(every=args.every, packs=args.packs, final_packs=args.final_packs)
        train(config, args.seed, stop=args.stop or args.steps, measuring=measuring, out=out)
        destroy_groups()


if __name__ == "__main__":
    main()

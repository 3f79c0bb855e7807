"""Trains one variant of the learning benchmark with one seed, in one process on one core.

    python -m benchmarks.learning.run_one --variant msa --seed 1 --out runs/learning

Appends a JSON object to OUT/VARIANT_SEED.jsonl at every measurement: settings first, then figures of held-out
packs (see measure.py), tokens, seconds and CPU seconds of training, measurements not counted.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

# Megatron compiles small functions on their first call, which helps nothing here.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
import torch.distributed as dist

from benchmarks.learning.measure import Meter
from benchmarks.learning.recipe import EVAL_STAGE, SEQ_LEN, STEPS, SYMBOLS, Variant, run_config, task_stages
from benchmarks.learning.retrieval_task import RetrievalTask
from msa_train.config import RunConfig, plan_stages, stage_at
from msa_train.data import load_datasets
from msa_train.parallel.groups import build_groups, destroy_groups
from msa_train.training.batch import make_batch
from msa_train.training.lr_schedule import stage_rates
from msa_train.training.torch_engine import TorchEngine

EVAL_SEED = 2**31
"held-out packs are the same for all seeds"
FEW_PACKS, FINAL_PACKS = 4, 48
"held-out packs of a measurement under way, and of the last one"


def build_tasks(config: RunConfig, seed: int) -> tuple[RetrievalTask, RetrievalTask]:
    """Packs to train on, and packs from held-out text."""
    train, held_out, _ = load_datasets(
        config.data, block_size=config.attention.block_size, vocab_size=config.model.vocab_size
    )
    assert held_out is not None, "the corpus has more than one document"
    stages = task_stages(config.train.steps)
    return (
        RetrievalTask(train.view, SEQ_LEN, stages, seed, SYMBOLS),
        RetrievalTask(held_out.view, SEQ_LEN, [EVAL_STAGE], EVAL_SEED, SYMBOLS),
    )


def train(config: RunConfig, seed: int, *, every: int, stop: int, out: TextIO) -> None:
    """Train, measuring every `every` steps on a few packs and at the end on many."""
    groups = build_groups(config.parallel, device=torch.device("cpu"))
    engine = TorchEngine(config, groups)
    task, held_out = build_tasks(config, seed)
    meter, plan = Meter(engine, SYMBOLS), plan_stages(config)
    trained_s = cpu_s = 0.0
    losses, kl = list[float](), list[dict[int, float]]()
    for step in range(stop):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        stage = stage_at(plan, step)
        if stage is not engine.stage:
            engine.set_stage(stage)
        batch = make_batch([task[step].pack], groups)
        result = engine.train_step(batch, stage_rates(step, config.optim, stage, config.train.steps))
        trained_s += time.perf_counter() - begin
        cpu_s += time.process_time() - begin_cpu
        losses.append(result.lm_loss_sum / batch.num_labels)
        kl.append({n: float(v) / batch.num_tokens for n, v in result.stats.kl.items()})
        done = step + 1
        if done % every == 0 or done == stop:
            packs = [held_out[i] for i in range(FINAL_PACKS if done == stop else FEW_PACKS)]
            row: dict[str, Any] = {
                "step": done,
                "tokens": done * SEQ_LEN,
                "train_s": round(trained_s, 1),
                "cpu_s": round(cpu_s, 1),
                "stage": stage.name,
                "train_loss": sum(losses) / len(losses),
                "kl": {n: sum(k[n] for k in kl) / len(kl) for n in kl[-1] if all(n in k for k in kl)},
                **meter.measure(packs),
            }
            losses.clear()
            kl.clear()
            print(json.dumps(row), file=out, flush=True)
            print(line_of(row), flush=True)


def line_of(row: dict[str, Any]) -> str:
    """A measurement in one line."""
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
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = run_config(Variant(args.variant), seed=args.seed, steps=args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    with (args.out / f"{args.variant}_{args.seed}.jsonl").open("w") as out:
        print(json.dumps({"variant": args.variant, "seed": args.seed, "steps": args.steps}), file=out)
        train(config, args.seed, every=args.every, stop=args.stop or args.steps, out=out)
    destroy_groups()


if __name__ == "__main__":
    main()

"""Measure what smaller gradients and optimizer states change in the loss, and what the update takes.

    python -m benchmarks.optim_memory.run --out benchmarks/results

Trains the demo's model by AdamW for some hundred steps with each setting, from the same weights on the same
packs, and the default with other seeds: how far runs part that differ in their first weights alone. Then
times the update of some million parameters on one thread against torch's AdamW, in turns. Writes
optim_memory.json and .md.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from benchmarks.machine import command, machine
from benchmarks.optim_memory.report import write_report
from launchers.hydra_config.compose import compose_run
from msa_train.config import MomentsDtype, RunConfig, plan_stages
from msa_train.config.lr_schedule import stage_rates
from msa_train.config.optimizer_bytes import optimizer_bytes
from msa_train.data import BatchStream
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.optim import tiled_adamw
from msa_train.training.optim.tiled_adamw import TiledAdamW
from msa_train.training.step_batch import make_batch
from msa_train.training.worker import load_data

MICRO_BATCHES, SEQ_LEN, RATE = 4, 512, 2e-3
ALL_SMALL = ("optim.moments_dtype=fp8", "optim.grads_dtype=bf16", "optim.offload=0.5")
# name, overrides, whether moments are rounded to the nearest instead (no setting: to compare with)
SETTINGS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("default", (), False),
    ("moments_dtype=bf16", ("optim.moments_dtype=bf16",), False),
    ("moments_dtype=bf16, nearest", ("optim.moments_dtype=bf16",), True),
    ("moments_dtype=fp8", ("optim.moments_dtype=fp8",), False),
    ("grads_dtype=bf16", ("optim.grads_dtype=bf16",), False),
    ("offload=0.5", ("optim.offload=0.5",), False),
    ("moments_dtype=fp8 grads_dtype=bf16 offload=0.5", ALL_SMALL, False),
)
TIMED_PARAMETERS = 2**23


def config_of(overrides: tuple[str, ...], steps: int, seed: int) -> RunConfig:
    """Compose the demo's model, trained by AdamW in bf16 with several micro-batches a step."""
    return compose_run(
        [
            "run=demo",
            "train=bf16",
            "parallel=single",
            "optim.algorithm=adamw",
            f"optim.lr={RATE}",
            "optim.weight_decay=0.1",
            "optim.warmup_steps=20",
            f"train.steps={steps}",
            f"train.global_batch_size={MICRO_BATCHES}",
            f"train.seed={seed}",
            f"data.seq_len={SEQ_LEN}",
            "logging.attention_every=0",
            *overrides,
        ]
    )


def train(config: RunConfig) -> dict[str, Any]:
    """Train, and return losses in nats per token: of all steps, the last tenth, and held-out packs."""
    groups = build_groups(config.parallel, device=torch.device("cpu"))
    engine, data = TorchEngine(config, groups), load_data(config)
    stage, size = plan_stages(config)[0], config.train.global_batch_size
    stream = BatchStream(data.train[SEQ_LEN])
    losses: list[float] = []
    for step in range(config.train.steps):
        batch = make_batch(stream.packs(step * size, 0, 1, size), groups, recall_seed=step)
        result = engine.train_step(batch, stage_rates(step, config.optim, stage, config.train.steps))
        losses.append(result.lm_loss_sum / batch.num_labels)
    held_out = [data.validation[SEQ_LEN][number] for number in range(16)]
    labels = make_batch(held_out, groups, recall_seed=0).num_labels
    validation = engine.evaluate(held_out) / labels
    parallel_state.destroy_model_parallel()
    tail = losses[-max(len(losses) // 10, 1) :]
    return {"losses": losses, "train": statistics.mean(tail), "validation": validation}


def _to_nearest(values: Tensor, _salt: int, *, first: int = 0) -> Tensor:
    return values.bfloat16()


def compare(steps: int, seeds: int) -> list[dict[str, Any]]:
    """Train every setting once and the default with further seeds."""
    runs = [(name, overrides, nearest, 1234) for name, overrides, nearest in SETTINGS]
    runs += [("default, other seed", (), False, 1234 + number) for number in range(1, seeds + 1)]
    rows: list[dict[str, Any]] = []
    for name, overrides, nearest, seed in runs:
        config = config_of(overrides, steps, seed)
        rounding = _to_nearest if nearest else tiled_adamw.to_bf16
        with mock.patch.object(tiled_adamw, "to_bf16", rounding):
            figures = train(config)
        size = optimizer_bytes(config.optim, config.train.precision)
        rows.append(
            {
                "name": name,
                "overrides": overrides,
                "seed": seed,
                **figures,
                "device_bytes": size.unsharded + size.state,
                "host_bytes": size.host_state,
            }
        )
        print(f"{name} (seed {seed}): validation {figures['validation']:.4f}", file=sys.stderr, flush=True)
    return rows


def time_updates(rounds: int) -> dict[str, float]:
    """Time one update of each kind, in turns: medians of the ratio to torch's AdamW in the same round."""

    def build(kind: str) -> torch.optim.Optimizer:
        parameter = nn.Parameter(torch.randn(TIMED_PARAMETERS))
        parameter.grad = torch.randn(TIMED_PARAMETERS)
        if kind == "torch foreach":
            return torch.optim.AdamW([parameter], foreach=True)
        settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
        return TiledAdamW([parameter], moments_dtype=MomentsDtype(kind), **settings)

    kinds = ("torch foreach", *(dtype.value for dtype in MomentsDtype))
    optimizers = {kind: build(kind) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds + 1):
        for kind, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[kind].append(time.perf_counter() - start)
    # the first round makes the moments
    return {
        kind: statistics.median(a / b for a, b in zip(seconds[kind][1:], seconds[kinds[0]][1:], strict=True))
        for kind in kinds
    }


def main(argv: list[str]) -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {
        "command": command("benchmarks.optim_memory.run", argv),
        **machine(),
        "steps": arguments.steps,
        "micro_batches": MICRO_BATCHES,
        "seq_len": SEQ_LEN,
        "runs": compare(arguments.steps, arguments.seeds),
        "timed_parameters": TIMED_PARAMETERS,
        "update_time_ratio": time_updates(arguments.rounds),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "optim_memory.json").write_text(json.dumps(found, indent=1) + "\n")
    write_report(found, arguments.out / "optim_memory.md")


if __name__ == "__main__":
    main(sys.argv[1:])

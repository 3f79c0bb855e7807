"""Training steps of a small fp32 model on either engine, the Megatron one through the CUDA shim."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from msa_train.config import (
    DeepSpeedConfig,
    EngineKind,
    KlTarget,
    ParallelConfig,
    Precision,
    Recompute,
    StageAttention,
    StageConfig,
    StageRope,
    plan_stages,
)
from msa_train.config.lr_schedule import LearningRates, stage_rates
from msa_train.model.layers import offload as offloading
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.deepspeed_engine import DeepSpeedEngine
from msa_train.training.engines.engine import TrainEngine
from msa_train.training.engines.megatron_engine import MegatronEngine
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.metrics.collect import StepMetrics
from msa_train.training.step_batch import make_batch
from tests.helpers import cuda_shim, devices
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.model_runs import SEQ_LEN, small_config, step_packs

STEPS = 3
PACKS_PER_STEP = 4


def build(
    engine: EngineKind,
    *,
    parallel: dict[str, Any],
    precision: Precision = Precision.fp32,
    recompute: Recompute = Recompute.none,
    recompute_stages: str = "",
    offload: bool = False,
    recipe: bool = False,
    num_layers: int = 4,
    optim: dict[str, Any] | None = None,
    tile_tokens: int = 0,
    deepspeed: DeepSpeedConfig | None = None,
) -> TrainEngine:
    """An engine over the whole world with the sizes in `parallel`; recipe: another stage for each step.

    optim: settings of the optimizer. deepspeed: of that engine.
    """
    config = small_config(precision=precision, recompute=recompute, offload=offload, tile_tokens=tile_tokens)
    config.train.recompute_stages = recompute_stages
    # Everything here is smaller than what is worth a copy.
    offloading.MIN_BYTES = 0
    # Divisible by two tensor-parallel ranks.
    config.model.num_heads, config.model.num_kv_heads, config.model.vocab_size = 8, 4, 64
    config.model.num_layers = num_layers
    config.model.init_std = config.model.embedding_init_std = 0.1
    config.optim = replace(config.optim, clip_grad=1.0, **(optim or {}))
    config.train.global_batch_size = PACKS_PER_STEP
    config.parallel = ParallelConfig(**parallel)
    if recipe:
        config.stages = recipe_stages()
        config.train.steps = 0
        # So large that a forgotten exception, such as that for norms, shows in the losses.
        config.optim.weight_decay, config.optim.index_weight_decay = 5.0, 20.0
        config.optim.index_lr_scale = 3.0
    groups = build_groups(config.parallel, device=devices.rank_device())
    if engine is EngineKind.torch:
        return TorchEngine(config, groups)
    if engine is EngineKind.deepspeed:
        assert deepspeed is not None, "with its stage of ZeRO"
        config.deepspeed = deepspeed
        return DeepSpeedEngine(config, groups)
    megatron = MegatronEngine(config, groups)
    cuda_shim.refuse_wrong_corners(megatron.megatron)
    return megatron


def recipe_stages() -> dict[str, StageConfig]:
    """One step each: only the index branch trains; only the backbone, without KL loss; both, both ways."""
    dense, tokens = StageAttention.dense, PACKS_PER_STEP * SEQ_LEN
    return {
        "index_only": StageConfig(tokens=tokens, attention=dense, lr_scale=0.0),
        "no_kl": StageConfig(
            tokens=tokens, attention=dense, kl=KlTarget.none, rope_type=StageRope.ntk, rope_factor=2.0
        ),
        "index_frozen": StageConfig(tokens=tokens, index_lr_scale=0.0),
        "sparse": StageConfig(
            tokens=tokens,
            lr_scale=0.5,
            rope_type=StageRope.yarn,
            rope_factor=4.0,
            rope_original_length=32,
        ),
    }


def train(engine: TrainEngine, first: int = 0, steps: int = STEPS) -> list[dict[str, Any]]:
    """Metrics of training steps and the validation loss after them."""
    groups = engine.groups
    metrics = StepMetrics(engine.config, groups)
    rows = []
    plan = plan_stages(engine.config) if engine.config.stages else ()
    for step in range(first, first + (len(plan) or steps)):
        packs = (step_packs()[0] + step_packs()[1])[:PACKS_PER_STEP]
        rate = 3e-3 / (step + 1)
        batch = make_batch(packs[groups.dp_rank :: groups.dp_size], groups, recall_seed=step)
        rates = LearningRates(backbone=rate, index=rate)
        if plan:
            engine.set_stage(plan[step])
            rates = stage_rates(step, engine.config.optim, plan[step], len(plan))
        result = engine.train_step(batch, rates)
        rows.append(metrics.gather(batch, result, engine.stage, counts_loss=engine.counts_loss()))
    value = engine.evaluate(step_packs()[1][:1])
    total = torch.tensor(value if engine.counts_loss() else 0.0, dtype=torch.float64, device=groups.device)
    dist.all_reduce(total, group=groups.model_parallel)
    dist.all_reduce(total, group=groups.cp)
    rows.append({"val_loss": float(total)})
    return rows


def worker(rank: int, world_size: int, cases: dict[str, dict[str, Any]], folder: str) -> None:
    """Runs all cases of one world size and writes rank 0's rows."""
    cuda_shim.install()
    for name, arguments in cases.items():
        rows = train(build(**arguments))
        if rank == 0:
            torch.save(rows, f"{folder}/{name}")
        leave_groups()

"""Hold the settings of the learning benchmark: five variants that differ in their attention alone."""

from enum import Enum

from benchmarks.learning.retrieval_task import Stage, Symbols
from msa_train.config import (
    AttentionConfig,
    DataConfig,
    EngineKind,
    ModelConfig,
    OptimConfig,
    OptimizerKind,
    Precision,
    RunConfig,
    StageAttention,
    StageConfig,
    TrainConfig,
)

SEQ_LEN, BLOCK_SIZE, TOPK = 2048, 8, 16
"the budget of BLOCK_SIZE * TOPK tokens is a sixteenth of the sequence"
STEPS = 1200
WARMUP_SHARE = 0.15
"of the steps: dense warm-up of the index branch"
SYMBOLS = Symbols(num_keys=64, num_values=64)
EVAL_STAGE = Stage(num_packs=1, doc_len=SEQ_LEN, num_records=48, num_queries=96)


class Variant(Enum):
    """Name the kinds of attention that are compared."""

    full = "full"
    swa = "swa"  # a sliding window as long as MSA's budget
    msa = "msa"  # dense warm-up, then selected blocks, KL loss throughout
    msa_no_warmup = "msa_no_warmup"
    msa_no_kl = "msa_no_kl"  # dense warm-up of the main branch; the index branch keeps its initial weights


def task_stages(steps: int) -> tuple[Stage, ...]:
    """Plan short documents full of lookups, then longer ones, then ones of the whole pack; a pack per step.

    The first two take a tenth of the steps together.
    """
    return (
        Stage(num_packs=max(steps // 16, 1), doc_len=256, num_records=11, num_queries=60),
        Stage(num_packs=max(steps * 3 // 80, 1), doc_len=512, num_records=16, num_queries=60),
        EVAL_STAGE,
    )


def run_config(variant: Variant, *, seed: int, steps: int) -> RunConfig:
    """Configure the run of one variant; seeds and steps aside, they differ in attention and stages only."""
    layers = {Variant.full: "full", Variant.swa: "swa"}.get(variant, "msa")
    stages: dict[str, StageConfig] = {}
    if variant in (Variant.msa, Variant.msa_no_kl):
        tokens = round(WARMUP_SHARE * steps) * SEQ_LEN
        stages["dense_warmup"] = StageConfig(tokens=tokens, attention=StageAttention.dense)
        stages["sparse"] = StageConfig()
    return RunConfig(
        name=f"learning_{variant.value}",
        engine=EngineKind.torch,
        model=ModelConfig(num_layers=2, layer_attention=layers, rotary_dim=16, rope_theta=1000.0),
        attention=AttentionConfig(
            block_size=BLOCK_SIZE,
            topk=TOPK,
            index_head_dim=32,
            kl_weight=0.0 if variant is Variant.msa_no_kl else 1.0,
            window=BLOCK_SIZE * TOPK,
        ),
        data=DataConfig(seq_len=SEQ_LEN),
        optim=OptimConfig(
            algorithm=OptimizerKind.muon,
            lr=1.5e-2,
            muon_lr=0.05,
            muon_momentum=0.5,
            weight_decay=0.0,
            index_weight_decay=0.0,
            min_lr_ratio=0.02,
            warmup_steps=10,
        ),
        train=TrainConfig(steps=steps, precision=Precision.fp32, seed=seed),
        stages=stages,
    )

"""A trace's peak is what an allocator counts: real steps of two ranks on the pretended GPU, three sizes."""

import gc
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from msa_train.config import (
    AttentionConfig,
    DataConfig,
    EngineKind,
    ExchangeConfig,
    Fusion,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    Recompute,
    RunConfig,
    TrainConfig,
)
from msa_train.config.lr_schedule import LearningRates
from msa_train.parallel.process_groups import build_groups
from msa_train.plan.trace.config_json import config_to_json
from msa_train.training.step_batch import make_batch
from msa_train.training.worker import build_engine
from tests.helpers.devices import rank_device
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.packs import make_pack
from tests.helpers.pretended_gpu.build import needs_pretended_gpu
from tests.helpers.spawn import run_ranks
from tests.helpers.training_command import ROOT

pytestmark = needs_pretended_gpu
WITHIN = 0.02


def config_of(
    engine: EngineKind,
    recompute: Recompute,
    *,
    seq_len: int,
    vocab_size: int,
    expert_ffn: int,
    topk: int = 2,
    precision: Precision = Precision.bf16,
) -> RunConfig:
    """Three layers: full attention, MSA, MSA with experts after the first; cp 2, ep 2."""
    return RunConfig(
        engine=engine,
        model=ModelConfig(
            num_layers=3,
            hidden_size=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            vocab_size=vocab_size,
            ffn_hidden_size=512,
            num_dense_ffn_layers=1,
            num_experts=4,
            moe_router_topk=topk,
            moe_ffn_hidden_size=expert_ffn,
            shared_expert_hidden_size=expert_ffn,
            layer_attention="full,msa",
            rotary_dim=32,
        ),
        attention=AttentionConfig(block_size=64, topk=4, index_head_dim=64),
        parallel=ParallelConfig(cp_size=2, ep_size=2),
        exchange=ExchangeConfig(hot_share=0.0),
        data=DataConfig(seq_len=seq_len),
        optim=OptimConfig(clip_grad=1.0, warmup_steps=0),
        # the pretended GPU runs fused functions step by step, a trace counts them as the kernels they are
        train=TrainConfig(precision=precision, recompute=recompute, global_batch_size=1, fusion=Fusion.none),
    )


CASES = {
    "experts": config_of(EngineKind.megatron, Recompute.full, seq_len=8192, vocab_size=512, expert_ffn=512),
    # in fp32: the pretended GPU has no products of 16 bits with results of 32, which a trace takes for given
    "head": config_of(
        EngineKind.megatron,
        Recompute.full,
        seq_len=2048,
        vocab_size=16384,
        expert_ffn=128,
        precision=Precision.fp32,
    ),
    # all experts for each token: layers that are kept together have no imbalance that one number could tell
    "torch": config_of(
        EngineKind.torch, Recompute.none, seq_len=4096, vocab_size=2048, expert_ffn=256, topk=4
    ),
}


def measure(rank: int, world_size: int, cases: dict[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """Allocated bytes at rest and at the peak of the second step, share fetched, and rows to each expert."""
    found = {}
    for name, config in cases.items():
        groups = build_groups(config.parallel, device=rank_device(), exchange=config.exchange)
        engine = build_engine(config, groups)
        length, vocab_size = config.data.seq_len, config.model.vocab_size
        pack = make_pack([length], seq_len=length, block_size=64, vocab_size=vocab_size, seed=1)
        batch, rates = make_batch([pack], groups), LearningRates(backbone=1e-4, index=1e-4)
        engine.train_step(batch, rates)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = engine.train_step(batch, rates)
        model = config.model
        # keys and values of the other rank's half of the tokens, of two layers with MSA
        width = 2 if config.train.precision is Precision.bf16 else 4
        remote = 2 * length // 2 * 2 * model.num_kv_heads * model.head_dim * width
        found[name] = {
            "static": before,
            "peak": torch.cuda.max_memory_allocated(),
            "fetched": result.counters.traffic["kv"] / remote,
            "rows": torch.stack(list(result.stats.tokens_per_expert.values())).cpu(),
        }
        del engine, result
        # models are full of cycles
        gc.collect()
        leave_groups()
    return found


def traced(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reports of requests, from one process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "msa_train.plan.trace"],
        input=json.dumps(requests), capture_output=True, text=True, cwd=ROOT, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def both() -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """By case: what the ranks measured, and the trace of the rank that took most."""
    ranks = run_ranks(2, measure, CASES, device="pretended")
    requests, worst = [], {}
    for name, config in CASES.items():
        worst[name] = max(range(2), key=lambda rank: ranks[rank][name]["peak"])
        # [layers, ranks] rows that the ranks' experts get of both ranks
        rows = sum(rank[name]["rows"] for rank in ranks).double().unflatten(1, (2, 2)).sum(2)
        uneven = rows[:, worst[name]] / rows.mean(1)
        # recomputed layers are there one at a time, others all together
        of_layers = uneven.mean() if config.train.recompute is Recompute.none else uneven.max()
        requests.append(
            {
                "config": config_to_json(config),
                "world_size": 2,
                "place": {"cp_rank": worst[name]},
                "assumptions": {
                    "fetched_share": ranks[worst[name]][name]["fetched"],
                    "expert_imbalance": float(of_layers),
                },
                "with_save": False,
            }
        )
    reports = dict(zip(CASES, traced(requests), strict=True))
    return {name: (ranks[worst[name]][name], reports[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_trace_counts_what_an_allocator_does(name: str, both: dict[str, Any]) -> None:
    real, report = both[name]
    assert report["static_bytes"] == pytest.approx(real["static"], rel=WITHIN)
    assert report["step"]["num_bytes"] == pytest.approx(real["peak"], rel=WITHIN)
    assert sum(report["step"]["by_part"].values()) == report["step"]["num_bytes"]

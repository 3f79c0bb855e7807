"""The run whose checkpoints of format 1 lie in tests/fixtures/format1, see the README there."""

import torch
import torch.distributed as dist

from msa_train.config import (
    AttentionConfig,
    DataConfig,
    EngineKind,
    ExchangeConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.engine import TrainEngine
from msa_train.training.engines.megatron_engine import MegatronEngine
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.optim.lr_schedule import LearningRates
from msa_train.training.step_batch import make_batch
from tests.helpers.packs import make_pack

SEQ_LEN, BLOCK_SIZE, VOCAB = 32, 4, 16
SAVED_STEP, STEPS = 2, 5


def format1_config(engine: EngineKind) -> RunConfig:
    """Two layers, one of them sparse in attention and network, of a few numbers each."""
    return RunConfig(
        engine=engine,
        model=ModelConfig(
            num_layers=2,
            hidden_size=8,
            num_heads=2,
            num_kv_heads=1,
            head_dim=4,
            vocab_size=VOCAB,
            num_dense_ffn_layers=1,
            ffn_hidden_size=8,
            num_experts=2,
            moe_router_topk=1,
            moe_ffn_hidden_size=4,
            shared_expert_hidden_size=4,
            layer_attention="full,msa",
            rotary_dim=2,
            init_std=0.3,
            embedding_init_std=0.3,
        ),
        attention=AttentionConfig(block_size=BLOCK_SIZE, topk=2, index_head_dim=4),
        exchange=ExchangeConfig(hot_share=0.0),
        data=DataConfig(seq_len=SEQ_LEN),
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        train=TrainConfig(global_batch_size=1, precision=Precision.fp32),
    )


def build_format1(engine: EngineKind) -> TrainEngine:
    """On one process; engine=megatron needs the CUDA shim."""
    config = format1_config(engine)
    groups = build_groups(config.parallel, device=torch.device("cpu"))
    return (MegatronEngine if engine is EngineKind.megatron else TorchEngine)(config, groups)


def train_format1(engine: TrainEngine, first: int, last: int) -> list[float]:
    """Loss sums of the steps after `first`, up to `last`."""
    assert dist.get_world_size() == 1
    losses = []
    for step in range(first, last):
        pack = make_pack([20, 7], seq_len=SEQ_LEN, block_size=BLOCK_SIZE, vocab_size=VOCAB, seed=step)
        batch = make_batch([pack], engine.groups)
        losses.append(engine.train_step(batch, LearningRates(backbone=1e-2, index=1e-2)).lm_loss_sum)
    return losses

"""Nothing of size S x S or T x S exists: peak memory of one long MSA layer, sparse and in the warm-up."""

import resource

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from msa_train.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    StageAttention,
    StageConfig,
    TrainConfig,
)
from msa_train.model.gpt import build_model
from msa_train.model.init_weights import init_weights
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.pack_forward import PackForward
from msa_train.parallel.process_groups import build_groups
from tests.helpers.packs import make_pack
from tests.helpers.spawn import run_ranks

SEQ_LEN, LIMIT_GIB = 131_072, 3.0
# T x S of one head alone would be 2 GiB in fp32.
WARMUP_SEQ_LEN, WARMUP_LIMIT_GIB = 32_768, 1.0


def long_config() -> RunConfig:
    """One MSA layer, hidden 256, fp32, block 128, top-k 16."""
    return RunConfig(
        model=ModelConfig(
            num_layers=1,
            hidden_size=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            num_dense_ffn_layers=1,
            layer_attention="msa",
            vocab_size=64,
        ),
        attention=AttentionConfig(block_size=128, topk=16, index_head_dim=32),
        parallel=ParallelConfig(cp_size=2),
        data=DataConfig(seq_len=SEQ_LEN),
        train=TrainConfig(precision=Precision.fp32),
    )


def warmup_config() -> RunConfig:
    """The same layer while its index branch warms up; fewer and smaller heads, as the work is quadratic."""
    config = long_config()
    config.model.num_heads, config.model.num_kv_heads, config.model.head_dim = 2, 1, 16
    config.model.rotary_dim = config.attention.index_head_dim = 16
    config.data.seq_len = WARMUP_SEQ_LEN
    config.stages = {"warm": StageConfig(attention=StageAttention.dense)}
    return config


def peak_of_one_layer(rank: int, world_size: int, warmup: bool) -> tuple[float, float, float]:
    """Peak resident memory in GiB before and after forward + backward, and the gradient's size."""
    config = warmup_config() if warmup else long_config()
    seq_len = config.data.seq_len
    groups = build_groups(config.parallel, device=torch.device("cpu"))
    assert isinstance(groups.collection, ProcessGroupCollection)
    model = build_model(config, groups.collection)
    init_weights(model, seed=1, tp_rank=0, tp_size=1, ep_rank=0)
    attention = model.decoder.layers[0].self_attention
    pack = make_pack([seq_len], seq_len=seq_len, block_size=128, vocab_size=64, seed=rank)
    params = PackForward(config, groups).prepare(
        pack, num_tokens=seq_len, comm=groups.cp_comm(), stats=LayerStats()
    )
    del pack
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(params.context.pack.tokens.shape[0], 1, 256, generator=generator).requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    out, _ = attention(hidden, packed_seq_params=params)
    out.sum().backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert hidden.grad is not None
    return before, after, float(hidden.grad.abs().sum())


def test_peak_memory_of_a_long_layer() -> None:
    for before, after, gradient in run_ranks(2, peak_of_one_layer, False, timeout_s=800):
        assert gradient > 0
        assert before < LIMIT_GIB / 2, f"{before:.2f} GiB before the layer leave no room to measure"
        assert after < LIMIT_GIB, f"{after:.2f} GiB, of which {before:.2f} before the layer"


def test_peak_memory_of_the_warm_up() -> None:
    for before, after, gradient in run_ranks(2, peak_of_one_layer, True, timeout_s=800):
        assert gradient > 0
        assert after - before < WARMUP_LIMIT_GIB, f"{after:.2f} GiB, of which {before:.2f} before the layer"

"""Training steps of a small fp64 model whose every number can be compared between layouts."""

from typing import Any

import torch
import torch.distributed as dist

from msa_train.config import (
    AttentionConfig,
    AttentionKernel,
    CpLayout,
    DataConfig,
    EngineKind,
    ExchangeConfig,
    Fusion,
    KvExchange,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    Recompute,
    RunConfig,
    StageConfig,
    TrainConfig,
)
from msa_train.config.lr_schedule import LearningRates
from msa_train.data import Pack
from msa_train.model.attention.msa import MsaSelfAttention
from msa_train.model.init_weights import global_names
from msa_train.model.inputs.pack_plan import shard_layout
from msa_train.model.layers.moe import SigmoidRouter
from msa_train.parallel.attention.selection_recall import RecallSums
from msa_train.parallel.process_groups import build_groups
from msa_train.parallel.sharding.shard_layout import ShardLayout
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.step_batch import make_batch
from tests.helpers.devices import rank_device
from tests.helpers.packs import make_pack

SEQ_LEN, BLOCK_SIZE, VOCAB = 96, 4, 61


def small_config(
    *,
    cp_size: int = 1,
    ep_size: int = 1,
    head_size: int = 1,
    exchange: KvExchange = KvExchange.selected,
    recompute: Recompute = Recompute.none,
    modules: str = "attention,experts,ffn,norm",
    offload: bool = False,
    fusion: Fusion = Fusion.none,
    precision: Precision = Precision.fp64,
    topk: int = 3,
    stage: StageConfig | None = None,
    temperature: float = 1.0,
    settings: ExchangeConfig | None = None,
    layout: CpLayout = CpLayout.contiguous,
    balance: tuple[bool, bool] = (True, True),
    kernel: AttentionKernel = AttentionKernel.auto,
    tile_tokens: int = 0,
) -> RunConfig:
    """Four layers: full attention + dense FFN, then MSA, a window, MSA + experts; 3 KV groups of 2 heads.

    settings: of the exchange; none: no nodes, nothing broadcast.
    """
    return RunConfig(
        engine=EngineKind.torch,
        model=ModelConfig(
            num_layers=4,
            hidden_size=24,
            num_heads=6,
            num_kv_heads=3,
            head_dim=8,
            vocab_size=VOCAB,
            ffn_hidden_size=32,
            num_experts=4,
            moe_router_topk=2,
            moe_ffn_hidden_size=16,
            shared_expert_hidden_size=8,
            routed_scaling_factor=2.0,
            layer_attention="full,msa,swa,msa",
            rotary_dim=4,
            rope_theta=10000.0,
            # Large weights: attention and routing far from uniform, so that mistakes show.
            init_std=0.3,
            embedding_init_std=0.3,
        ),
        attention=AttentionConfig(
            block_size=BLOCK_SIZE,
            topk=topk,
            index_head_dim=6,
            kl_weight=0.7,
            kl_temperature=temperature,
            # No multiple of a block; longer than some documents, shorter than others.
            window=10,
            window_sink=1,
            kernel=kernel,
        ),
        parallel=ParallelConfig(
            cp_size=cp_size,
            cp_head_size=head_size,
            ep_size=ep_size,
            cp_layout=layout,
            kv_exchange=exchange,
            balance_index=balance[0],
            balance_full_attention=balance[1],
        ),
        exchange=settings or ExchangeConfig(hot_share=0.0),
        data=DataConfig(seq_len=SEQ_LEN),
        optim=OptimConfig(lr=1e-2, warmup_steps=0, clip_grad=0.0),
        train=TrainConfig(
            global_batch_size=2,
            precision=precision,
            recompute=recompute,
            recompute_modules=modules,
            offload_activations=offload,
            tile_tokens=tile_tokens,
            fusion=fusion,
        ),
        stages={} if stage is None else {"only": stage},
    )


def step_packs() -> list[list[Pack]]:
    """Two steps of two packs: one long document; many short; one below a block; nothing remote anywhere."""
    lengths = [
        [[96], [5, 13, 7, 1, 9, 21, 4, 6]],
        [[3, 50, 17], [7, 8, 8, 5, 8, 8, 8, 6, 8, 8, 8, 3]],
    ]
    return [
        [
            make_pack(documents, seq_len=SEQ_LEN, block_size=BLOCK_SIZE, vocab_size=VOCAB, seed=10 * step + i)
            for i, documents in enumerate(packs)
        ]
        for step, packs in enumerate(lengths)
    ]


def run_steps(config: RunConfig, steps: list[list[Pack]] | None = None) -> dict[str, Any]:
    """Training steps on the given packs, or `step_packs()`; must be called by every rank of the world.

    Returns the rank, its device and what it observed, with sums over ranks where a quantity is cut over them:
    per step `loss` and `kl` (global sums), `gradients` by global name (experts of this rank only),
    `selections` by (pack, layer) for this rank's tokens, whose `positions` stand by pack, `expert_bias` by
    layer, `traffic`, `attention`: sums over the sampled queries of the first packs by layer.
    """
    head_size = config.parallel.cp_head_size
    groups = build_groups(config.parallel, device=rank_device(), exchange=config.exchange)
    engine = TorchEngine(config, groups)
    selections: dict[tuple[int, int], torch.Tensor] = {}
    packs_of_step: list[int] = []
    msa_layers: list[int] = []
    # A rank whose pack has no query to sample has no sums.
    width = RecallSums.width(SEQ_LEN // BLOCK_SIZE)
    nothing = torch.zeros(config.model.num_kv_heads, width, dtype=torch.float64)
    for layer in engine.model.decoder.layers:
        if isinstance(layer.self_attention, MsaSelfAttention):
            msa_layers.append(layer.layer_number)
            layer.self_attention.register_forward_hook(
                _recorder(selections, packs_of_step, layer.layer_number), with_kwargs=True
            )
    observed: list[dict[str, Any]] = []
    for number, packs in enumerate(steps or step_packs()):
        selections.clear()
        packs_of_step[:] = [i for i in range(len(packs)) if i % groups.dp_size == groups.dp_rank]
        batch = make_batch([packs[i] for i in packs_of_step], groups, recall_seed=number)
        result = engine.train_step(batch, LearningRates(backbone=1e-2, index=1e-2))
        names = global_names(engine.model, ep_rank=groups.ep_rank)
        observed.append(
            {
                "loss": _sum(result.lm_loss_sum) / batch.num_labels,
                "kl": {n: _sum(float(v)) for n, v in sorted(result.stats.kl.items())},
                "grad_norm": result.grad_norm,
                "gradients": {name: engine.gradients.view(p).to("cpu", copy=True) for name, p in names},
                "selections": dict(selections),
                "expert_bias": [
                    m.expert_bias.to("cpu", copy=True)
                    for m in engine.model.modules()
                    if isinstance(m, SigmoidRouter)
                ],
                "attention": {n: _sum_all(result.stats.attention.get(n, nothing)) for n in msa_layers},
                "traffic": dict(result.counters.traffic.received),
                "positions": {
                    i: _positions(shard_layout(config, packs[i], groups.cp_rank, head_size))
                    for i in packs_of_step
                },
                "first_group": _first_group(config, groups.cp_rank),
            }
        )
    return {"rank": groups.rank, "device": groups.device.type, "steps": observed}


def _first_group(config: RunConfig, cp_rank: int) -> int:
    """KV group of the first column of this rank's selections."""
    size = config.parallel.cp_head_size
    return cp_rank % size * (config.model.num_kv_heads // size)


def _recorder(selections: dict[tuple[int, int], torch.Tensor], packs: list[int], layer: int) -> Any:
    def hook(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        record = kwargs["packed_seq_params"].record
        if record.replaying:
            return
        seen = sum(1 for key in selections if key[1] == layer)
        if record.block_indices is not None:
            selections[packs[seen], layer] = record.block_indices.to("cpu", copy=True)

    return hook


def _positions(layout: ShardLayout) -> torch.Tensor:
    """Of this rank's tokens in the pack."""
    return torch.cat([torch.arange(start, stop) for start, stop in layout.ranges])


def _sum(value: float) -> float:
    return float(_sum_all(torch.tensor(value, dtype=torch.float64)))


def _sum_all(value: torch.Tensor) -> torch.Tensor:
    total = value.to(rank_device(), copy=True)
    dist.all_reduce(total)
    return total.cpu()

"""Prepare a pack for the model and run it: shard, plans, device copies, forward pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from msa_train.config import (
    AttentionKind,
    KlTarget,
    KvExchange,
    Precision,
    RunConfig,
    Stage,
    StageAttention,
    plan_stages,
)
from msa_train.data import Pack
from msa_train.model.gpt import MsaGptModel, forward_arguments
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.inputs.pack_params import PackParams, UlyssesInputs, tensor_parallel_padding
from msa_train.model.inputs.pack_shard import PackShard, make_pack_shard
from msa_train.model.layers.rotary import rotary_table
from msa_train.model.transformer_config import DTYPES
from msa_train.parallel.attention.selection_recall import RecallQueries, sample_queries
from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.kv_exchange.cost_model import choose_full_exchange
from msa_train.parallel.process_groups import Groups
from msa_train.parallel.sharding.partition import make_partition, merge_ranks
from msa_train.parallel.sharding.shard_layout import ShardLayout
from msa_train.parallel.sharding.ulysses import token_order

OnSelection = Callable[[int, Tensor], None]
"is told a layer number and its block ids [T, M, topk]"


class PackForward:
    """Runs the model on a pack: cuts this rank's shard, builds what the layers need beside it.

    stage: of the run; decides what MSA layers attend to and learn from. The first one until it is set.
    open_selections: asked at each pack where its layers' selections go; None: nowhere. on_pack: called when a
    pack begins.
    """

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        self.config, self.groups = config, groups
        self.stage: Stage = plan_stages(config)[0]
        self.open_selections: Callable[[Pack, ShardLayout], OnSelection | None] | None = None
        self.on_pack: Callable[[], None] = lambda: None

    def layout(self, pack: Pack, head_size: int = 1) -> ShardLayout:
        """This rank's shard of a pack; with `head_size`, that of its head group."""
        block_size, cp_size = self.config.attention.block_size, self.groups.cp_size
        plan = make_partition(self.config.parallel.cp_layout, cp_size, pack.cu_seqlens.tolist(), block_size)
        return ShardLayout(
            seq_len=len(pack.tokens),
            block_size=block_size,
            cp_rank=self.groups.cp_rank // head_size,
            cp_size=cp_size // head_size,
            split=plan if head_size == 1 else merge_ranks(plan, head_size),
        )

    def prepare(
        self,
        pack: Pack,
        *,
        num_tokens: int,
        comm: CpComm,
        stats: LayerStats,
        recall_seed: int | None = None,
    ) -> tuple[PackShard, PackParams]:
        """This rank's shard, with the KL loss divided by groups and by `num_tokens` real queries.

        With a `recall_seed` MSA layers compare the selection of sampled queries with full attention.
        """
        self.on_pack()
        config, groups = self.config, self.groups
        layout = self.layout(pack)
        heads = self._share_heads(pack, layout, recall_seed)
        # Head groups attend instead: they have the plan.
        with_full = heads is None and self._attends_fully()
        local = make_pack_shard(pack, layout, config.parallel, groups.device, with_full=with_full)
        double = config.train.precision is Precision.fp64
        table = rotary_table(
            local.doc_position,
            rotary_dim=config.model.rotary_dim,
            theta=config.model.rope_theta,
            dtype=torch.float64 if double else torch.float32,
        )
        kl_weight = 0.0 if self.stage.kl is KlTarget.none else config.attention.kl_weight
        params = PackParams(
            pack=local,
            comm=comm,
            rotary=table,
            kl_weight=kl_weight / (config.model.num_kv_heads * num_tokens),
            attention=self.stage.attention,
            stats=stats,
            padding_mask=tensor_parallel_padding(local.valid, groups.tp_rank, groups.tp_size),
            recall=self._sample(pack, layout, recall_seed),
            full_exchange=self._full_exchange(local if heads is None else heads.pack),
            on_selection=None if self.open_selections is None else self.open_selections(pack, layout),
            heads=heads,
        )
        return local, params

    def _attends_fully(self) -> bool:
        """Whether some layer attends to everything in this stage."""
        dense = self.stage.attention is StageAttention.dense
        return dense or AttentionKind.full in self.config.model.attention_kinds()

    def _share_heads(self, pack: Pack, layout: ShardLayout, recall_seed: int | None) -> UlyssesInputs | None:
        """What attention runs on where neighbours trade tokens for KV groups; layout: of this rank."""
        size = self.config.parallel.cp_head_size
        if size == 1:
            return None
        merged = self.layout(pack, size)
        return UlyssesInputs(
            pack=make_pack_shard(
                pack, merged, self.config.parallel, self.groups.device, with_full=self._attends_fully()
            ),
            recall=self._sample(pack, merged, recall_seed),
            order=token_order(layout.plan, merged.cp_rank * size, size, self.groups.device),
        )

    def _full_exchange(self, local: PackShard) -> KvExchange | None:
        """What `auto` means for this pack's full attention; local: what attention runs on."""
        config, parallel, comm = self.config, self.config.parallel, self.groups.comm
        if parallel.kv_exchange is not KvExchange.auto or local.full is None:
            return None
        element = DTYPES[config.train.precision].itemsize
        num_groups = config.model.num_kv_heads // (parallel.tp_size * parallel.cp_head_size)
        others = local.layout.seq_len - local.layout.local_seq_len
        token = 2 * num_groups * config.model.head_dim * element
        return choose_full_exchange(local.full.busiest, others, token, (comm.sequence or comm).rates)

    def _sample(self, pack: Pack, layout: ShardLayout, seed: int | None) -> RecallQueries | None:
        if seed is None:
            return None
        return sample_queries(
            pack.cu_seqlens.tolist(),
            pack.doc_lengths.tolist(),
            layout,
            topk=self.config.attention.topk,
            count=self.config.logging.attention_queries,
            seed=seed,
            device=self.groups.device,
        )

    def __call__(self, model: MsaGptModel, local: PackShard, params: PackParams) -> Tensor:
        """Losses [T] on the last pipeline stage, hidden states before."""
        return model(**forward_arguments(local.tokens, local.labels), packed_seq_params=params)

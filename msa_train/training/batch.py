"""The packs of one optimizer step on one data-parallel rank, and their forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
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
from msa_train.data import IGNORE_LABEL, Pack
from msa_train.model.gpt import MsaGptModel, forward_arguments
from msa_train.model.local_pack import LocalPack, make_local_pack
from msa_train.model.pack_params import HeadShare, LayerStats, PackParams, tensor_parallel_padding
from msa_train.model.rotary import rotary_table
from msa_train.model.transformer_config import DTYPES
from msa_train.parallel.attention_probe import ProbeQueries, sample_queries
from msa_train.parallel.collectives import CpComm
from msa_train.parallel.exchange_cost import choose_full_exchange
from msa_train.parallel.fault_watch import watched
from msa_train.parallel.groups import Groups
from msa_train.parallel.head_exchange import token_order
from msa_train.parallel.layout import ShardLayout
from msa_train.parallel.sequence_plan import make_plan, merge_ranks
from msa_train.training.selection_log import SelectionLog


@dataclass(slots=True)
class StepBatch:
    """packs: this data-parallel rank's; the counts are over all ranks' packs of the step.

    num_labels: tokens with a label, the divisor of the language-model loss. num_tokens: real tokens, the
    divisor of the KL loss. num_packs: packs. probe_seed: seed of the queries whose attention is looked at, in
    the first pack of the step; None: of none. has_first: whether that pack is among this rank's.
    """

    packs: Sequence[Pack]
    num_labels: int
    num_tokens: int
    num_packs: int
    probe_seed: int | None = None
    has_first: bool = True

    def probe_seed_of(self, pack: Pack) -> int | None:
        """The seed, for the first pack of the step: the same queries however packs are dealt."""
        return self.probe_seed if self.has_first and pack is self.packs[0] else None


def make_batch(packs: Sequence[Pack], groups: Groups, *, probe_seed: int | None = None) -> StepBatch:
    """Count over all data-parallel ranks, so that no divisor depends on how packs are dealt."""
    labels = sum(int((pack.labels != IGNORE_LABEL).sum()) for pack in packs)
    tokens = sum(int(pack.doc_lengths.sum()) for pack in packs)
    counts = torch.tensor([labels, tokens, len(packs)], dtype=torch.int64, device=groups.device)
    with watched("step_counts"):
        dist.all_reduce(counts, group=groups.dp)
    num_labels, num_tokens, num_packs = counts.tolist()
    # A step without any label is a step all the same, as it is to Megatron: gradients of the loss are zero,
    # the KL loss has its own, moments and weight decay go on. Left out, it would shift the schedule by one.
    return StepBatch(
        packs=packs,
        num_labels=max(num_labels, 1),
        num_tokens=max(num_tokens, 1),
        num_packs=num_packs,
        probe_seed=probe_seed,
        has_first=groups.dp_rank == 0,
    )


class PackForward:
    """Runs the model on a pack: cuts this rank's shard, builds what the layers need beside it.

    stage: of the run; decides what MSA layers attend to and learn from. The first one until it is set.
    selection_log: where the step's selections go; None: nowhere. on_pack: called when a pack begins.
    """

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        self.config, self.groups = config, groups
        self.stage: Stage = plan_stages(config)[0]
        self.selection_log: SelectionLog | None = None
        self.on_pack: Callable[[], None] = lambda: None

    def layout(self, pack: Pack, head_size: int = 1) -> ShardLayout:
        """This rank's shard of a pack; with `head_size`, that of its head group."""
        block_size, cp_size = self.config.attention.block_size, self.groups.cp_size
        plan = make_plan(self.config.parallel.cp_layout, cp_size, pack.cu_seqlens.tolist(), block_size)
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
        probe_seed: int | None = None,
    ) -> tuple[LocalPack, PackParams]:
        """This rank's shard, with the KL loss divided by groups and by `num_tokens` real queries.

        With a `probe_seed` MSA layers compare the selection of sampled queries with full attention.
        """
        self.on_pack()
        config, groups = self.config, self.groups
        layout = self.layout(pack)
        heads = self._share_heads(pack, layout, probe_seed)
        # Head groups attend instead: they have the plan.
        with_full = heads is None and self._attends_fully()
        local = make_local_pack(pack, layout, config.parallel, groups.device, with_full=with_full)
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
            probe=self._sample(pack, layout, probe_seed),
            full_exchange=self._full_exchange(local if heads is None else heads.pack),
            on_selection=None if self.selection_log is None else self.selection_log.open(pack, layout),
            heads=heads,
        )
        return local, params

    def _attends_fully(self) -> bool:
        """Whether some layer attends to everything in this stage."""
        dense = self.stage.attention is StageAttention.dense
        return dense or AttentionKind.full in self.config.model.attention_kinds()

    def _share_heads(self, pack: Pack, layout: ShardLayout, probe_seed: int | None) -> HeadShare | None:
        """What attention runs on where neighbours trade tokens for KV groups; layout: of this rank."""
        size = self.config.parallel.cp_head_size
        if size == 1:
            return None
        merged = self.layout(pack, size)
        return HeadShare(
            pack=make_local_pack(
                pack, merged, self.config.parallel, self.groups.device, with_full=self._attends_fully()
            ),
            probe=self._sample(pack, merged, probe_seed),
            order=token_order(layout.plan, merged.cp_rank * size, size, self.groups.device),
        )

    def _full_exchange(self, local: LocalPack) -> KvExchange | None:
        """What `auto` means for this pack's full attention; local: what attention runs on."""
        config, parallel, comm = self.config, self.config.parallel, self.groups.comm
        if parallel.kv_exchange is not KvExchange.auto or local.full is None:
            return None
        element = DTYPES[config.train.precision].itemsize
        num_groups = config.model.num_kv_heads // (parallel.tp_size * parallel.cp_head_size)
        others = local.layout.seq_len - local.layout.local_seq_len
        token = 2 * num_groups * config.model.head_dim * element
        return choose_full_exchange(local.full.busiest, others, token, (comm.sequence or comm).rates)

    def _sample(self, pack: Pack, layout: ShardLayout, seed: int | None) -> ProbeQueries | None:
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

    def __call__(self, model: MsaGptModel, local: LocalPack, params: PackParams) -> Tensor:
        """Losses [T] on the last pipeline stage, hidden states before."""
        return model(**forward_arguments(local.tokens, local.labels), packed_seq_params=params)

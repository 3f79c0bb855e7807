"""Prepare a pack for the model and run it: plan on the host, one copy to the device, forward pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from msa_train.config import KlTarget, KvExchange, Precision, RunConfig, Stage, plan_stages
from msa_train.data import Pack
from msa_train.model.gpt import MsaGptModel, forward_arguments
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.inputs.pack_params import OnSelection, PackContext, PackParams, tensor_parallel_padding
from msa_train.model.inputs.pack_plan import plan_pack
from msa_train.model.inputs.pack_shard import PackShard
from msa_train.model.layers.rotary import rotary_table
from msa_train.model.transformer_config import DTYPES
from msa_train.parallel.comm.cp_groups import CpGroups
from msa_train.parallel.comm.to_device import plan_to_device
from msa_train.parallel.kv_exchange.cost_model import choose_full_exchange
from msa_train.parallel.process_groups import Groups
from msa_train.parallel.sharding.shard_layout import ShardLayout


class PackForward:
    """Run the model on packs, one at a time."""

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        self.config, self.groups = config, groups
        self.stage: Stage = plan_stages(config)[0]
        "of the run; decides what MSA layers attend to and learn from"
        self.open_selections: Callable[[Pack, ShardLayout], OnSelection | None] | None = None
        "asked at each pack where its layers' selections go; None: nowhere"
        self.on_pack: Callable[[], None] = lambda: None
        "called when a pack begins"

    def prepare(
        self,
        pack: Pack,
        *,
        num_tokens: int,
        comm: CpGroups,
        stats: LayerStats,
        recall_seed: int | None = None,
        with_kl_value: bool = True,
    ) -> PackParams:
        """Plan one pack and bring the plan to the device.

        Args:
            pack: the whole pack.
            num_tokens: real queries of the step, the divisor of the KL loss besides KV heads.
            comm: collectives of the step.
            stats: where layers leave figures.
            recall_seed: draws queries whose selection is compared with full attention; None: none.
            with_kl_value: form the KL loss's value too, and not its gradient alone.

        Returns:
            What travels with the pack through the layers, its tensors on the device.
        """
        self.on_pack()
        config, groups = self.config, self.groups
        plan = plan_pack(config, self.stage, pack, groups.cp_rank, recall_seed)
        full_exchange = self._full_exchange(plan.attended, comm)
        # from here on the device works, and nothing makes the host wait for it
        plan = plan_to_device(plan, groups.device)
        shard = plan.shard
        kl_weight = 0.0 if self.stage.kl is KlTarget.none else config.attention.kl_weight
        context = PackContext(
            pack=shard,
            comm=comm,
            rotary=self._rotary_table(shard),
            # The KL loss is a mean over KV heads and the step's real queries, on all ranks and in all packs.
            # Layers sum divergences, so this factor makes the sums of ranks add up to that mean.
            kl_weight=kl_weight / (config.model.num_kv_heads * num_tokens),
            attention=self.stage.attention,
            topk=self.stage.topk,
            stats=stats,
            padding_mask=tensor_parallel_padding(shard.valid, groups.tp_rank, groups.tp_size),
            with_kl_value=with_kl_value,
            recall=plan.recall,
            full_exchange=full_exchange,
            on_selection=None if self.open_selections is None else self.open_selections(pack, shard.layout),
            ulysses=plan.ulysses,
        )
        return PackParams(context=context)

    def __call__(self, model: MsaGptModel, params: PackParams) -> Tensor:
        """Run the model: losses [T] on the last pipeline stage, hidden states [T, 1, H] before."""
        pack = params.context.pack
        return model(**forward_arguments(pack.tokens, pack.labels), packed_seq_params=params)

    def _rotary_table(self, shard: PackShard) -> tuple[Tensor, Tensor]:
        model, is_double = self.config.model, self.config.train.precision is Precision.fp64
        # Positions in the document and not in the pack: a packed document gives what it gives alone.
        return rotary_table(
            shard.doc_position,
            rotary_dim=model.rotary_dim,
            rope=self.stage.rope,
            dtype=torch.float64 if is_double else torch.float32,
        )

    def _full_exchange(self, attended: PackShard, comm: CpGroups) -> KvExchange | None:
        """Decide what `auto` means for this pack's full attention; None where nothing is to be decided."""
        config, parallel = self.config, self.config.parallel
        if parallel.kv_exchange is not KvExchange.auto or attended.full is None:
            return None
        num_local_kv_heads = config.model.num_kv_heads // (parallel.tp_size * parallel.cp_head_size)
        elements = 2 * num_local_kv_heads * config.model.head_dim
        element_bytes = DTYPES[config.train.precision].itemsize
        # Per rank of the exchange: with Ulysses groups fewer ranks, more tokens, fewer KV heads each.
        others = attended.layout.seq_len - attended.layout.local_seq_len
        return choose_full_exchange(
            attended.full.busiest,
            others,
            elements * element_bytes,
            comm.kv.rates,
            grad_bytes=elements * max(element_bytes, 4),
        )

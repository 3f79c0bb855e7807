"""Project hidden states to queries, keys and values around an attention over the split sequence.

Shapes: T local tokens, M KV heads on this tensor-parallel rank, G query heads per KV head, D head dim,
H hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from msa_train.config import KvExchange, QkNorm
from msa_train.model.attention.index_branch import PendingIndexKeys
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.inputs.pack_params import PackContext, PackParams, SelectionRecord
from msa_train.model.layers.norm import RMSNorm, norm_and_rotate
from msa_train.model.layers.recompute import run_unit
from msa_train.model.transformer_config import MsaTransformerConfig
from msa_train.parallel.attention.cp_full import FullAttentionArgs
from msa_train.parallel.attention.dense_kl import IndexKl
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.kv_exchange.requests import ExchangeDecision
from msa_train.parallel.sharding.ulysses import cp_to_hp, gather_tokens, hp_to_cp, start_cp_to_hp


@dataclass
class AttentionSubmodules:
    """Name the classes of the projections, so that a spec can put in other implementations."""

    linear_qkv: ModuleSpec | type
    "fused projection to queries, keys and values, cut by column"
    linear_proj: ModuleSpec | type
    "output projection, cut by row"


_Attend = Callable[["AttentionInputs", PackContext, SelectionRecord], Tensor]
"computes [T, M, G, D] from queries, keys and values"


@dataclass(slots=True)
class AttentionInputs:
    """Hold what attention proper computes with, normalised and rotated."""

    queries: Tensor | Callable[[], Tensor]
    "[T, M, G, D], or what waits for them where they are on their way"
    k: Tensor
    "[T, M, D]"
    v: Tensor
    "[T, M, D]"
    index: PendingIndexKeys | None
    "index queries and keys; None in layers without an index branch"

    @property
    def q(self) -> Tensor:
        """Return the queries [T, M, G, D]; the first to ask waits for them."""
        if not isinstance(self.queries, Tensor):
            self.queries = self.queries()
        return self.queries


class GroupedQueryAttention(MegatronModule, ABC):
    """Apply projections, query/key norm and rotary embedding around an attention over the split sequence.

    Takes the place of Megatron's SelfAttention in a layer spec. Weight names and the layout of the fused
    projection (per KV head: its query heads, key, value) are Megatron's.
    """

    config: MsaTransformerConfig

    def __init__(
        self,
        config: MsaTransformerConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        attn_mask_type: Any = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config)
        assert pg_collection is not None, "Megatron's layers hand on their process groups"
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        self.tp_rank, self.tp_size = pg_collection.tp.rank(), pg_collection.tp.size()
        model = config.model
        self.num_local_kv_heads = model.num_kv_heads // self.tp_size
        self.heads_per_group, self.head_dim = model.num_heads // model.num_kv_heads, model.head_dim
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            (model.num_heads + 2 * model.num_kv_heads) * model.head_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=pg_collection.tp,
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            model.num_heads * model.head_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=pg_collection.tp,
        )
        self.is_recomputed = False
        "attention proper keeps its inputs alone and runs again in the backward pass; set by the layer"
        self._build_norms(config)

    def _build_norms(self, config: MsaTransformerConfig) -> None:
        model, eps = config.model, config.layernorm_epsilon
        self.q_layernorm = self.k_layernorm = None
        if model.qk_norm is QkNorm.head:
            self.q_layernorm = RMSNorm(config, model.head_dim, eps)
            self.k_layernorm = RMSNorm(config, model.head_dim, eps)
        elif model.qk_norm is QkNorm.width:
            self.q_layernorm = RMSNorm(config, model.num_heads * model.head_dim, eps)
            self.k_layernorm = RMSNorm(config, model.num_kv_heads * model.head_dim, eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackParams,
        **_unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: hidden_states [T, 1, H] -> (output [T, 1, H], None), Megatron's contract of attention."""
        context, record = packed_seq_params.context, packed_seq_params.record
        # First what travels, then what is computed meanwhile.
        # index keys leave first, so that they travel while queries, keys and values are projected
        index = self.start(hidden_states, context)
        inputs = AttentionInputs(*self._project(hidden_states, context), index)
        attend = self.attend if context.ulysses is None else self._attend_by_heads
        if self.is_recomputed and self.training and torch.is_grad_enabled():
            out = self._attend_twice(attend, inputs, context, record)
        else:
            out = attend(inputs, context, record)
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))

    def start(self, hidden_states: Tensor, context: PackContext) -> PendingIndexKeys | None:
        """Begin what can travel while queries, keys and values are projected."""
        return None

    def gather_index_keys(self, q: Tensor, k: Tensor, context: PackContext) -> PendingIndexKeys | None:
        """Begin to gather the index keys [T, Di] of all ranks; None in layers without an index branch."""
        return None

    def _attend_twice(
        self, attend: _Attend, inputs: AttentionInputs, context: PackContext, record: SelectionRecord
    ) -> Tensor:
        """Attend now and again in the backward pass: only q, k, v and the index branch's are kept."""
        # Taken out by the first run: index keys of all ranks must not live on to the backward pass.
        pending = [inputs.index]

        def run(q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            index = pending.pop() if pending else self.gather_index_keys(q_index, k_index, context)
            if index is not None:
                index = replace(index, q=q_index, k=k_index)
            return attend(AttentionInputs(q, k, v, index), context, record)

        index = inputs.index
        of_index = (None, None) if index is None else (index.q, index.k)
        return run_unit(run, record, inputs.q, inputs.k, inputs.v, *of_index)

    def _project(self, hidden_states: Tensor, context: PackContext) -> tuple[Tensor, Tensor, Tensor]:
        """Project to q [T, M, G, D], k and v [T, M, D], normalised; q and k rotated.

        Example: the fused output of one KV head with G = 2 is [query 0, query 1, key, value], D numbers each.
        """
        # With sequence parallelism this gathers the tokens of all tensor-parallel ranks: T rows come out.
        mixed, _ = self.linear_qkv(hidden_states)
        mixed = mixed.view(mixed.shape[0], self.num_local_kv_heads, self.heads_per_group + 2, self.head_dim)
        q, k, v = mixed.split([self.heads_per_group, 1, 1], dim=2)
        k, v = k.squeeze(2), v.squeeze(2)
        rotary, is_fused = context.rotary, self.config.is_fused
        q = norm_and_rotate(self.q_layernorm, q, rotary, is_fused=is_fused)
        return q, norm_and_rotate(self.k_layernorm, k, rotary, is_fused=is_fused), v

    def _attend_by_heads(
        self, inputs: AttentionInputs, context: PackContext, record: SelectionRecord
    ) -> Tensor:
        """Run `attend` on the tokens of the Ulysses group and this rank's share of the KV heads.

        Index queries have left while the others were projected, queries travel until they are wanted; the
        index key, which all heads share, is gathered.
        """
        ulysses = context.ulysses
        assert context.comm.ulysses is not None, "Ulysses inputs come with their group"
        assert ulysses is not None, "called where there are Ulysses groups"
        comm = context.comm.ulysses.for_layer(self.layer_number)
        index = inputs.index
        # Keys and values [T, M, 2 * D] first: an exchange begins with them. Queries are wanted after scoring.
        both = cp_to_hp(torch.cat((inputs.k, inputs.v), dim=-1), comm, ulysses.order)
        queries = start_cp_to_hp(inputs.q.flatten(2), comm, ulysses.order)
        if index is not None:
            traded_index = index.traded or start_cp_to_hp(index.q, comm, ulysses.order)
            k_index = gather_tokens(index.k, comm, ulysses.order)
            index = replace(index, q=traded_index.wait(), k=k_index, traded=None)
        # What is sent on must lie in one piece.
        k, v = (x.contiguous() for x in both.chunk(2, dim=-1))

        def wait() -> Tensor:
            return queries.wait().unflatten(-1, (self.heads_per_group, self.head_dim))

        traded = AttentionInputs(wait, k, v, index)
        out = self.attend(traded, context.of_ulysses_group(), record)
        return hp_to_cp(out, comm, ulysses.order)

    @abstractmethod
    def attend(self, inputs: AttentionInputs, context: PackContext, record: SelectionRecord) -> Tensor:
        """Attend to what this kind of layer sees.

        Args:
            started: what `start` returned.
            q: [T, M, G, D] queries, rotated.
            k: [T, M, D] keys, rotated.
            v: [T, M, D] values.
            context: of the pack.
            record: of this layer; filled in the forward pass, followed where the layer is recomputed.

        Returns:
            [T, M, G, D] in q's dtype.

        Raises:
            ExchangeError: a collective failed, or a rank's request does not fit.
        """

    def kv_comm(self, context: PackContext) -> KvComm:
        """Return the collectives over which KV blocks travel; their messages name this layer."""
        return context.comm.kv.for_layer(self.layer_number)

    def _record(self, decision: ExchangeDecision, context: PackContext, record: SelectionRecord) -> None:
        """Keep what was agreed for a recomputation; count which way was taken."""
        if not record.replaying:
            # On the host: the decision is known there.
            selected = torch.tensor([decision.kind is KvExchange.selected, 1], dtype=torch.int64)
            LayerStats.add(context.stats.exchange, self.layer_number, selected)
        record.exchange = decision

    def full_attention_args(self, context: PackContext, kl: IndexKl | None = None) -> FullAttentionArgs:
        """Describe full attention over this pack."""
        pack = context.pack
        assert pack.full is not None, "planned where a layer attends to everything"
        return FullAttentionArgs(
            plan=pack.full,
            layout=pack.layout,
            comm=self.kv_comm(context),
            exchange=context.full_exchange or self.config.kv_exchange,
            softmax_scale=self.head_dim**-0.5,
            kl=kl,
            keep=self.config.exchange.keep_for_backward,
            kernel=self.config.attention.full_kernel,
        )

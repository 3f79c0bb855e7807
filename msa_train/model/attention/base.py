"""Self-attention layers: grouped-query projections, then full attention or MSA over the split sequence.

Shapes: T local tokens, M KV groups on this tensor-parallel rank, G query heads per group, D head dim,
H hidden size, NB blocks of the pack, B block size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from msa_kernels import select_blocks, window_blocks
from torch import Tensor

from msa_train.config import KvExchange, QkNorm, StageAttention
from msa_train.model.attention.index_branch import IndexBranch
from msa_train.model.inputs.pack_params import LayerStats, PackParams
from msa_train.model.inputs.pack_shard import LocalPack
from msa_train.model.layers.norm import RMSNorm
from msa_train.model.layers.rotary import apply_rotary
from msa_train.model.transformer_config import MsaTransformerConfig
from msa_train.parallel.attention.cp_full import FullCall, cp_full_attention
from msa_train.parallel.attention.cp_sparse import SparseCall, cp_sparse_attention
from msa_train.parallel.attention.dense_kl import IndexKl
from msa_train.parallel.attention.selection_recall import probe_attention
from msa_train.parallel.comm.cp_comm import CpComm, Pending
from msa_train.parallel.kv_exchange.requests import needed_pairs, pairs_by_owner
from msa_train.parallel.sharding.redistribute import move_rows
from msa_train.parallel.sharding.shard_layout import ShardLayout
from msa_train.parallel.sharding.ulysses import gather_tokens, to_heads, to_tokens


@dataclass(slots=True)
class StartedIndex:
    """Index queries [T, M, Di] and keys [T, Di]; all_keys [P, T, Di] by `layout` on their way, or None."""

    q: Tensor
    k: Tensor
    all_keys: Pending[Tensor] | None
    layout: ShardLayout


@dataclass
class AttentionSubmodules:
    """Classes of the projections, so that a spec can put in other implementations."""

    linear_qkv: ModuleSpec | type
    linear_proj: ModuleSpec | type


class GroupedQueryAttention(MegatronModule, ABC):
    """Projections, query/key norm and rotary embedding around an attention over the split sequence.

    Takes the place of Megatron's SelfAttention in a layer spec. Weight names and the layout of the fused
    projection (per KV group: its query heads, key, value) are Megatron's.
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
        self.num_groups = model.num_kv_heads // self.tp_size
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
        """hidden_states [T, 1, H] -> (output [T, 1, H], None), Megatron's contract of an attention module."""
        started = self.start(hidden_states, packed_seq_params)
        q, k, v = self._project(hidden_states, packed_seq_params)
        if packed_seq_params.heads is None:
            out = self.attend(started, q, k, v, packed_seq_params)
        else:
            out = self._attend_by_heads(started, q, k, v, packed_seq_params)
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))

    def start(self, hidden_states: Tensor, params: PackParams) -> StartedIndex | None:
        """Begin what can travel while queries, keys and values are projected."""
        return None

    def _project(self, hidden_states: Tensor, params: PackParams) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, M, G, D], k and v [T, M, D], normalised and rotated."""
        assert params.rotary is not None, "a pack comes with its rotary table"
        mixed, _ = self.linear_qkv(hidden_states)
        mixed = mixed.view(mixed.shape[0], self.num_groups, self.heads_per_group + 2, self.head_dim)
        q, k, v = mixed.split([self.heads_per_group, 1, 1], dim=2)
        k, v = k.squeeze(2), v.squeeze(2)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = _normalise(self.q_layernorm, q), _normalise(self.k_layernorm, k)
        return apply_rotary(q, params.rotary), apply_rotary(k, params.rotary), v

    def _attend_by_heads(
        self, started: StartedIndex | None, q: Tensor, k: Tensor, v: Tensor, params: PackParams
    ) -> Tensor:
        """`attend` on the tokens of all ranks of the head group and this rank's share of the KV groups."""
        comm, heads = self.comm_of(params).heads, params.heads
        assert comm is not None, "head groups come with their collectives"
        assert heads is not None, "called where there are head groups"
        parts = [q.flatten(2), k, v] if started is None else [q.flatten(2), k, v, started.q]
        mixed = to_heads(torch.cat(parts, dim=-1), comm, heads.order)
        # What is sent on must lie in one piece.
        q, k, v, *index = (x.contiguous() for x in mixed.split([part.shape[-1] for part in parts], dim=-1))
        if started is not None:
            k_index = gather_tokens(started.k, comm, heads.order)
            started = replace(started, q=index[0], k=k_index)
        q = q.unflatten(-1, (self.heads_per_group, self.head_dim))
        return to_tokens(self.attend(started, q, k, v, params.of_head_group()), comm, heads.order)

    @abstractmethod
    def attend(
        self, started: StartedIndex | None, q: Tensor, k: Tensor, v: Tensor, params: PackParams
    ) -> Tensor:
        """Attention proper: what `start` returned, shapes as `_project` returns them -> [T, M, G, D]."""

    def comm_of(self, params: PackParams) -> CpComm:
        """Collectives whose messages name this layer."""
        assert params.comm is not None, "the step fills in the collectives"
        return params.comm.of_layer(self.layer_number)

    def _record(self, call: SparseCall, params: PackParams) -> None:
        """Keep what was agreed for a recomputation; count which way was taken."""
        if not params.record.replaying and call.requests is not None:
            selected = torch.tensor([call.requests.kind is KvExchange.selected, 1], dtype=torch.int64)
            LayerStats.add(params.stats.exchange, self.layer_number, selected)
        params.record.requests = call.requests

    def full_call(self, params: PackParams, kl: IndexKl | None = None) -> FullCall:
        """Dense attention over this pack."""
        pack = params.pack
        assert pack is not None, "the step fills in the pack"
        assert pack.full is not None, "planned where a layer attends to everything"
        return FullCall(
            plan=pack.full,
            layout=pack.layout,
            comm=self.comm_of(params),
            exchange=params.full_exchange or self.config.kv_exchange,
            softmax_scale=self.head_dim**-0.5,
            kl=kl,
            keep=self.config.exchange.keep_for_backward,
        )


def _normalise(norm: RMSNorm, x: Tensor) -> Tensor:
    """Per head, or over all heads together when the norm is that wide."""
    if norm.weight.numel() == x.shape[-1]:
        return norm(x)
    return norm(x.reshape(x.shape[0], -1)).view_as(x)


class FullSelfAttention(GroupedQueryAttention):
    """Dense causal attention within documents."""

    def attend(
        self, started: StartedIndex | None, q: Tensor, k: Tensor, v: Tensor, params: PackParams
    ) -> Tensor:
        """See GroupedQueryAttention.attend."""
        return cp_full_attention(q, k, v, self.full_call(params))


class WindowSelfAttention(GroupedQueryAttention):
    """Causal sliding window within documents, with a sink: position decides which blocks are exchanged."""

    def attend(
        self, started: StartedIndex | None, q: Tensor, k: Tensor, v: Tensor, params: PackParams
    ) -> Tensor:
        """See GroupedQueryAttention.attend."""
        pack, attention = params.pack, self.config.attention
        assert pack is not None, "the step fills in the pack"
        block_indices, window = window_blocks(
            pack.position,
            pack.position - pack.doc_position,
            block_size=attention.block_size,
            num_blocks=pack.layout.num_blocks,
            window=attention.window,
            sink_blocks=attention.window_sink,
            query_valid=pack.valid,
        )
        call = SparseCall(
            block_indices=block_indices[:, None].expand(-1, k.shape[1], -1),
            position=pack.position,
            layout=pack.layout,
            comm=self.comm_of(params),
            exchange=self.config.kv_exchange,
            softmax_scale=self.head_dim**-0.5,
            settings=self.config.exchange,
            requests=params.record.requests,
            window=window,
            kernel=attention.kernel,
        )
        out = cp_sparse_attention(q, k, v, None, None, call)
        self._record(call, params)
        return out


class MsaSelfAttention(GroupedQueryAttention):
    """MiniMax Sparse Attention: the index branch selects blocks, exact attention runs on them."""

    def __init__(self, config: MsaTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.index_branch = IndexBranch(config, kwargs["pg_collection"])

    def attend(
        self, started: StartedIndex | None, q: Tensor, k: Tensor, v: Tensor, params: PackParams
    ) -> Tensor:
        """See GroupedQueryAttention.attend."""
        pack, record = params.pack, params.record
        assert pack is not None, "the step fills in the pack"
        assert started is not None, "index queries and keys were projected first"
        q_index, k_index = started.q, started.k
        if started.all_keys is None:
            # Zero gradients for the index branch, and not none: gradient hooks wait for every parameter.
            return cp_full_attention(q, k, v, self.full_call(params), q_index, k_index)
        all_keys = started.layout.in_order(started.all_keys.wait())
        if params.attention is StageAttention.dense:
            return self._attend_densely(q, k, v, q_index, k_index, all_keys, params)
        if record.block_indices is None:
            record.block_indices = self._select(q_index, all_keys, params)
        if params.probe is not None and not record.replaying:
            self._probe(q, k, record.block_indices[params.probe.rows], params)
        if params.on_selection is not None and not record.replaying:
            params.on_selection(self.layer_number, record.block_indices)
        trains_index = params.kl_weight > 0 and torch.is_grad_enabled()
        block_size = self.config.attention.block_size
        call = SparseCall(
            block_indices=record.block_indices,
            position=pack.position,
            layout=pack.layout,
            comm=self.comm_of(params),
            exchange=self.config.kv_exchange,
            softmax_scale=self.head_dim**-0.5,
            index_scale=q_index.shape[-1] ** -0.5,
            k_index=all_keys.view(-1, block_size, all_keys.shape[-1]) if trains_index else None,
            kl_weight=params.kl_weight,
            kl_temperature=self.config.attention.kl_temperature,
            on_kl=lambda kl: LayerStats.add(params.stats.kl, self.layer_number, kl),
            settings=self.config.exchange,
            needed=None if record.replaying else needed_pairs(record.block_indices, pack.layout.num_blocks),
            requests=record.requests,
            kernel=self.config.attention.kernel,
        )
        out = cp_sparse_attention(q, k, v, q_index, k_index, call)
        if call.needed is not None:
            self._count_selected(call.needed, params)
        self._record(call, params)
        return out

    def start(self, hidden_states: Tensor, params: PackParams) -> StartedIndex:
        """Project index queries and keys; the keys travel from here on."""
        assert params.pack is not None, "the step fills in the pack"
        assert params.rotary is not None, "a pack comes with its rotary table"
        q, k = self.index_branch(hidden_states, params.rotary)
        if params.attention is StageAttention.dense and params.kl_weight == 0:
            return StartedIndex(q, k, None, params.pack.layout)
        pending = self.comm_of(params).start_all_gather(k.detach(), "index_key")
        return StartedIndex(q, k, pending, params.pack.layout)

    def _attend_densely(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_index: Tensor,
        k_index: Tensor,
        all_keys: Tensor,
        params: PackParams,
    ) -> Tensor:
        """Full attention, under which the index branch learns from all causal tokens."""
        if params.probe is not None and not params.record.replaying:
            assert params.pack is not None, "checked by the caller"
            rows = params.probe.rows
            selected = self._select_some(
                q_index.detach()[rows], all_keys, params.pack, position=params.pack.position[rows]
            )
            self._probe(q, k, selected, params)
        kl = IndexKl(
            all_keys=all_keys,
            weight=params.kl_weight,
            index_scale=q_index.shape[-1] ** -0.5,
            temperature=self.config.attention.kl_temperature,
            on_kl=lambda value: LayerStats.add(params.stats.kl, self.layer_number, value),
            kernel=self.config.attention.kernel,
        )
        return cp_full_attention(q, k, v, self.full_call(params, kl), q_index, k_index)

    def _select(self, q_index: Tensor, all_keys: Tensor, params: PackParams) -> Tensor:
        """Selection [T, M, topk] of all local queries, some of which other ranks may compute."""
        pack, comm = params.pack, self.comm_of(params)
        assert pack is not None, "checked by the caller"
        q_index, moves = q_index.detach(), pack.index.moves
        if moves is not None:
            q_index = move_rows(q_index, moves.there, comm, "index_query")
        parts, row = [], 0
        for start, stop in pack.index.ranges:
            rows = slice(row, row + stop - start)
            valid = pack.valid[rows] if moves is None else None
            parts.append(self._select_some(q_index[rows], all_keys, pack, start, valid=valid))
            row = rows.stop
        selected = parts[0] if len(parts) == 1 else torch.cat(parts)
        if moves is not None:
            selected = move_rows(selected, moves.back, comm, "index_query")
            selected.masked_fill_(~pack.valid[:, None, None], -1)
        return selected

    def _select_some(
        self,
        q_index: Tensor,
        all_keys: Tensor,
        pack: LocalPack,
        start: int = 0,
        *,
        valid: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Selection of queries at positions from `start` on, or at those in `position`."""
        attention = self.config.attention
        return select_blocks(
            q_index,
            all_keys,
            pack.cu_seqlens,
            block_size=attention.block_size,
            topk=attention.topk,
            local_blocks=attention.local_blocks,
            query_offset=start,
            query_valid=valid,
            position=position,
            kernel=attention.kernel.value,
        )

    def _probe(self, q: Tensor, k: Tensor, selected: Tensor, params: PackParams) -> None:
        """Compare the sampled queries' selection with full attention; selected: [sampled, M, topk]."""
        probe, comm = params.probe, self.comm_of(params)
        assert probe is not None, "called where queries are sampled"
        q, k = q.detach()[probe.rows], k.detach()
        sums = probe_attention(q, k, selected, probe, comm, softmax_scale=self.head_dim**-0.5).flat()
        LayerStats.add(params.stats.attention, self.layer_number, self._of_all_groups(sums, params))

    def _of_all_groups(self, values: Tensor, params: PackParams) -> Tensor:
        """[M, ...] of the groups that this rank attends for -> [num_kv_heads, ...], zero for the others."""
        whole = values.new_zeros(self.config.model.num_kv_heads, *values.shape[1:])
        first = self.tp_rank * self.num_groups + params.head_rank * len(values)
        whole[first : first + len(values)] = values
        return whole

    def _count_selected(self, needed: Tensor, params: PackParams) -> None:
        """Remote pairs per group: what `selected` sends, whatever is used. needed: [M, NB] bool."""
        assert params.pack is not None, "checked by the caller"
        layout = params.pack.layout
        pairs = pairs_by_owner(needed, layout).view(layout.cp_size, needed.shape[0], -1).sum((0, 2))
        LayerStats.add(params.stats.selected, self.layer_number, self._of_all_groups(pairs, params))

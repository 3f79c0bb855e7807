"""Self-attention layers: grouped-query projections, then full attention or MSA over the split sequence.

Shapes: T local tokens, M KV groups on this tensor-parallel rank, G query heads per group, D head dim,
H hidden size, NB blocks of the pack, B block size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from msa_kernels import select_blocks, window_blocks
from torch import Tensor

from msa_train.config import QkNorm, StageAttention
from msa_train.model.index_branch import IndexBranch
from msa_train.model.local_pack import LocalPack
from msa_train.model.norm import RMSNorm
from msa_train.model.pack_params import LayerStats, PackParams
from msa_train.model.rotary import apply_rotary
from msa_train.model.transformer_config import MsaTransformerConfig
from msa_train.parallel.attention_probe import probe_attention
from msa_train.parallel.block_requests import needed_pairs
from msa_train.parallel.cp_dense_kl import IndexKl
from msa_train.parallel.cp_full_attention import FullCall, cp_full_attention
from msa_train.parallel.cp_sparse_attention import SparseCall, cp_sparse_attention
from msa_train.parallel.relayout import move_rows


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
        q, k, v = self._project(hidden_states, packed_seq_params)
        out = self.attend(hidden_states, q, k, v, packed_seq_params)
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))

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

    @abstractmethod
    def attend(self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, params: PackParams) -> Tensor:
        """Attention proper: shapes as `_project` returns them -> [T, M, G, D]."""

    def full_call(self, params: PackParams, kl: IndexKl | None = None) -> FullCall:
        """Dense attention over this pack."""
        pack, comm = params.pack, params.comm
        assert pack is not None, "the step fills in the pack"
        assert comm is not None, "the step fills in the collectives"
        return FullCall(
            plan=pack.full,
            layout=pack.layout,
            comm=comm,
            exchange=self.config.kv_exchange,
            softmax_scale=self.head_dim**-0.5,
            kl=kl,
        )


def _normalise(norm: RMSNorm, x: Tensor) -> Tensor:
    """Per head, or over all heads together when the norm is that wide."""
    if norm.weight.numel() == x.shape[-1]:
        return norm(x)
    return norm(x.reshape(x.shape[0], -1)).view_as(x)


class FullSelfAttention(GroupedQueryAttention):
    """Dense causal attention within documents."""

    def attend(self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, params: PackParams) -> Tensor:
        """See GroupedQueryAttention.attend."""
        return cp_full_attention(q, k, v, self.full_call(params))


class WindowSelfAttention(GroupedQueryAttention):
    """Causal sliding window within documents, with a sink: position decides which blocks are exchanged."""

    def attend(self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, params: PackParams) -> Tensor:
        """See GroupedQueryAttention.attend."""
        pack, comm, attention = params.pack, params.comm, self.config.attention
        assert pack is not None, "the step fills in the pack"
        assert comm is not None, "the step fills in the collectives"
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
            block_indices=block_indices[:, None].expand(-1, self.num_groups, -1),
            position=pack.position,
            layout=pack.layout,
            comm=comm,
            exchange=self.config.kv_exchange,
            softmax_scale=self.head_dim**-0.5,
            requests=params.record.requests,
            window=window,
        )
        out = cp_sparse_attention(q, k, v, None, None, call)
        params.record.requests = call.requests
        return out


class MsaSelfAttention(GroupedQueryAttention):
    """MiniMax Sparse Attention: the index branch selects blocks, exact attention runs on them."""

    def __init__(self, config: MsaTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.index_branch = IndexBranch(config, kwargs["pg_collection"])

    def attend(self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, params: PackParams) -> Tensor:
        """See GroupedQueryAttention.attend."""
        pack, comm, record = params.pack, params.comm, params.record
        assert pack is not None, "the step fills in the pack"
        assert comm is not None, "the step fills in the collectives"
        assert params.rotary is not None, "a pack comes with its rotary table"
        q_index, k_index = self.index_branch(hidden_states, params.rotary)
        if params.attention is StageAttention.dense and params.kl_weight == 0:
            # Zero gradients for the index branch, and not none: gradient hooks wait for every parameter.
            return cp_full_attention(q, k, v, self.full_call(params), q_index, k_index)
        with torch.no_grad():
            all_keys = pack.layout.in_order(comm.all_gather(k_index.detach(), "index_key"))
        if params.attention is StageAttention.dense:
            return self._attend_densely(q, k, v, q_index, k_index, all_keys, params)
        if record.block_indices is None:
            record.block_indices = self._select(q_index, all_keys, params)
        if params.probe is not None and not record.replaying:
            self._probe(q, k, record.block_indices[params.probe.rows], params)
        trains_index = params.kl_weight > 0 and torch.is_grad_enabled()
        block_size = self.config.attention.block_size
        call = SparseCall(
            block_indices=record.block_indices,
            position=pack.position,
            layout=pack.layout,
            comm=comm,
            exchange=self.config.kv_exchange,
            softmax_scale=self.head_dim**-0.5,
            index_scale=q_index.shape[-1] ** -0.5,
            k_index=all_keys.view(-1, block_size, all_keys.shape[-1]) if trains_index else None,
            kl_weight=params.kl_weight,
            kl_temperature=self.config.attention.kl_temperature,
            on_kl=lambda kl: LayerStats.add(params.stats.kl, self.layer_number, kl),
            requests=record.requests,
        )
        out = cp_sparse_attention(q, k, v, q_index, k_index, call)
        record.requests = call.requests
        if not record.replaying:
            self._count_selected(record.block_indices, params)
        return out

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
        )
        return cp_full_attention(q, k, v, self.full_call(params, kl), q_index, k_index)

    def _select(self, q_index: Tensor, all_keys: Tensor, params: PackParams) -> Tensor:
        """Selection [T, M, topk] of all local queries, some of which other ranks may compute."""
        pack, comm = params.pack, params.comm
        assert pack is not None, "checked by the caller"
        assert comm is not None, "checked by the caller"
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
        )

    def _probe(self, q: Tensor, k: Tensor, selected: Tensor, params: PackParams) -> None:
        """Compare the sampled queries' selection with full attention; selected: [sampled, M, topk]."""
        probe, comm = params.probe, params.comm
        assert probe is not None, "called where queries are sampled"
        assert comm is not None, "checked by the caller"
        q, k = q.detach()[probe.rows], k.detach()
        sums = probe_attention(q, k, selected, probe, comm, softmax_scale=self.head_dim**-0.5).flat()
        LayerStats.add(params.stats.attention, self.layer_number, self._of_all_groups(sums))

    def _of_all_groups(self, values: Tensor) -> Tensor:
        """[M, ...] of this tensor-parallel rank's groups -> [num_kv_heads, ...], zero for the others."""
        whole = values.new_zeros(self.config.model.num_kv_heads, *values.shape[1:])
        first = self.tp_rank * self.num_groups
        whole[first : first + self.num_groups] = values
        return whole

    def _count_selected(self, block_indices: Tensor, params: PackParams) -> None:
        """Remote pairs per group, before any exchange: what `selected` would send."""
        assert params.pack is not None, "checked by the caller"
        layout = params.pack.layout
        needed = needed_pairs(block_indices, layout.num_blocks)
        needed[:, layout.own_blocks(needed.device)] = False
        LayerStats.add(params.stats.selected, self.layer_number, self._of_all_groups(needed.sum(1)))

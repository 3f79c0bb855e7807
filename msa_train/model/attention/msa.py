"""MiniMax Sparse Attention of the model: index branch, block selection, attention over the chosen blocks."""

from typing import Any

import torch
from msa_kernels import select_blocks
from torch import Tensor

from msa_train.config import StageAttention
from msa_train.model.attention.base import GroupedQueryAttention
from msa_train.model.attention.index_branch import IndexBranch, PendingIndexKeys
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.inputs.pack_params import PackContext, SelectionRecord
from msa_train.model.inputs.pack_shard import PackShard
from msa_train.model.transformer_config import MsaTransformerConfig
from msa_train.parallel.attention.cp_full import cp_full_attention
from msa_train.parallel.attention.cp_sparse import SparseAttentionArgs, cp_sparse_attention
from msa_train.parallel.attention.dense_kl import IndexKl
from msa_train.parallel.attention.selection_recall import measure_recall
from msa_train.parallel.kv_exchange.requests import kv_blocks_by_owner, needed_kv_blocks
from msa_train.parallel.sharding.redistribute import move_rows


class MsaSelfAttention(GroupedQueryAttention):
    """MiniMax Sparse Attention: the index branch selects blocks, exact attention runs on them."""

    def __init__(self, config: MsaTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.index_branch = IndexBranch(config, kwargs["pg_collection"])

    def attend(
        self,
        started: PendingIndexKeys | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: PackContext,
        record: SelectionRecord,
    ) -> Tensor:
        """See GroupedQueryAttention.attend."""
        pack = context.pack
        assert started is not None, "index queries and keys were projected first"
        q_index, k_index = started.q, started.k
        if started.all_keys is None:
            # Zero gradients for the index branch, and not none: gradient hooks wait for every parameter.
            return cp_full_attention(q, k, v, self.full_attention_args(context), q_index, k_index)
        all_keys = started.layout.in_order(started.all_keys.wait())
        if context.attention is StageAttention.dense:
            return self._attend_densely(q, k, v, started, all_keys, context, record)
        if record.block_indices is None:
            record.block_indices = self._select(q_index, all_keys, context)
        if context.recall is not None and not record.replaying:
            self._measure_recall(q, k, record.block_indices[context.recall.rows], context)
        if context.on_selection is not None and not record.replaying:
            context.on_selection(self.layer_number, record.block_indices)
        trains_index = context.kl_weight > 0 and torch.is_grad_enabled()
        block_size = self.config.attention.block_size
        needed = None
        if not record.replaying:
            needed = needed_kv_blocks(record.block_indices, pack.layout.num_blocks)
        call = SparseAttentionArgs(
            block_indices=record.block_indices,
            position=pack.position,
            layout=pack.layout,
            comm=self.kv_comm(context),
            exchange=self.config.kv_exchange,
            softmax_scale=self.head_dim**-0.5,
            index_scale=q_index.shape[-1] ** -0.5,
            k_index=all_keys.view(-1, block_size, all_keys.shape[-1]) if trains_index else None,
            kl_weight=context.kl_weight,
            kl_temperature=self.config.attention.kl_temperature,
            on_kl=lambda kl: LayerStats.add(context.stats.kl, self.layer_number, kl),
            settings=self.config.exchange,
            needed=needed,
            decision=record.exchange,
            kernel=self.config.attention.kernel,
        )
        out, decision = cp_sparse_attention(q, k, v, q_index, k_index, call)
        if needed is not None:
            self._count_selected(needed, context)
        self._record(decision, context, record)
        return out

    def start(self, hidden_states: Tensor, context: PackContext) -> PendingIndexKeys:
        """Project index queries and keys; the keys travel from here on."""
        q, k = self.index_branch(hidden_states, context.rotary)
        if context.attention is StageAttention.dense and context.kl_weight == 0:
            return PendingIndexKeys(q, k, None, context.pack.layout)
        pending = context.comm.whole.for_layer(self.layer_number).start_all_gather(k.detach(), "index_key")
        return PendingIndexKeys(q, k, pending, context.pack.layout)

    def _attend_densely(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        started: PendingIndexKeys,
        all_keys: Tensor,
        context: PackContext,
        record: SelectionRecord,
    ) -> Tensor:
        """Attend fully; the index branch learns from all causal tokens."""
        q_index, k_index = started.q, started.k
        if context.recall is not None and not record.replaying:
            rows = context.recall.rows
            selected = self._select_some(
                q_index.detach()[rows], all_keys, context.pack, position=context.pack.position[rows]
            )
            self._measure_recall(q, k, selected, context)
        kl = IndexKl(
            all_keys=all_keys,
            weight=context.kl_weight,
            index_scale=q_index.shape[-1] ** -0.5,
            temperature=self.config.attention.kl_temperature,
            on_kl=lambda value: LayerStats.add(context.stats.kl, self.layer_number, value),
            kernel=self.config.attention.kernel,
        )
        return cp_full_attention(q, k, v, self.full_attention_args(context, kl), q_index, k_index)

    def _select(self, q_index: Tensor, all_keys: Tensor, context: PackContext) -> Tensor:
        """Selection [T, M, topk] of all local queries, some of which other ranks may compute."""
        pack, comm = context.pack, self.kv_comm(context)
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
        pack: PackShard,
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

    def _measure_recall(self, q: Tensor, k: Tensor, selected: Tensor, context: PackContext) -> None:
        """Compare the sampled queries' selection with full attention; selected: [sampled, M, topk]."""
        recall, comm = context.recall, self.kv_comm(context)
        assert recall is not None, "called where queries are sampled"
        q, k = q.detach()[recall.rows], k.detach()
        sums = measure_recall(q, k, selected, recall, comm, softmax_scale=self.head_dim**-0.5).flat()
        LayerStats.add(context.stats.attention, self.layer_number, self._of_all_groups(sums, context))

    def _of_all_groups(self, values: Tensor, context: PackContext) -> Tensor:
        """[M, ...] of the groups that this rank attends for -> [num_kv_heads, ...], zero for the others."""
        whole = values.new_zeros(self.config.model.num_kv_heads, *values.shape[1:])
        first = self.tp_rank * self.num_groups + context.ulysses_rank * len(values)
        whole[first : first + len(values)] = values
        return whole

    def _count_selected(self, needed: Tensor, context: PackContext) -> None:
        """Remote pairs per group: what `selected` sends, whatever is used. needed: [M, NB] bool."""
        layout = context.pack.layout
        pairs = kv_blocks_by_owner(needed, layout).view(layout.cp_size, needed.shape[0], -1).sum((0, 2))
        LayerStats.add(context.stats.selected, self.layer_number, self._of_all_groups(pairs, context))

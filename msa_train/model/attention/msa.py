"""Run MiniMax Sparse Attention (MSA): index branch, block selection, attention to the chosen blocks.

The keys of a document lie in blocks of B tokens (128). For each query and KV head a light index query scores
all earlier index keys; a block's score is the highest of its tokens. The `topk` (16) best blocks, always
among them the `local_blocks` (1) that end with the query's own, are attended to exactly by all query heads of
the KV head. So attention costs topk * B keys a query however long the document is. Scores still grow with it,
but with one small head per KV head.

The selection has no gradient. The index branch learns from a KL loss that draws its scores towards the mean
attention of the KV head's query heads; that loss trains the index branch alone, and the language-model loss
everything else. A run goes through stages (`StageAttention`): in a *dense* warm-up stage MSA layers attend to
everything and the KL loss is over all tokens; afterwards both are over the selected blocks.

Under context parallelism index keys go to all ranks, queries stay, and only selected KV blocks travel: the
six steps are told in `parallel/attention/cp_sparse.py`. This file takes steps 1 and 2, scores and top-k, and
calls the rest.

Cost of scores: about S^2 / 2 products of Di numbers per KV head over all ranks. At S = 1M and 256 ranks that
is 2.1e9 for each rank and KV head where work is balanced, else twice that on the last rank; attention itself
is 8.4e6 query-key products per query head.

Shapes: S tokens of the pack, T local tokens, M KV heads on this rank, G query heads per KV head, D head dim,
Di index head dim, NB blocks of the pack, P ranks.

Source: arXiv 2606.13392.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from msa_kernels import select_blocks
from msa_kernels.block_sparse_attention.op import pack_blocks
from torch import Tensor

from msa_train.config import KvExchange, StageAttention
from msa_train.model.attention.base import AttentionInputs, GroupedQueryAttention
from msa_train.model.attention.index_branch import IndexBranch, PendingIndexKeys
from msa_train.model.attention.slice_selection import select_in_slices
from msa_train.model.inputs.layer_stats import LayerStats
from msa_train.model.inputs.pack_params import PackContext, SelectionRecord
from msa_train.model.transformer_config import MsaTransformerConfig
from msa_train.parallel.attention.cp_full import cp_full_attention
from msa_train.parallel.attention.cp_sparse import SparseAttentionArgs, cp_sparse_attention
from msa_train.parallel.attention.dense_kl import IndexKl
from msa_train.parallel.attention.selection_recall import measure_recall
from msa_train.parallel.kv_exchange.requests import kv_blocks_by_owner, needed_kv_blocks
from msa_train.parallel.kv_exchange.slices.begin import Begun, EarlyGather, begin_exchange
from msa_train.parallel.kv_exchange.slices.sliced_fetch import SlicedFetch
from msa_train.parallel.sharding.partition import Range
from msa_train.parallel.sharding.redistribute import move_rows
from msa_train.parallel.sharding.ulysses import start_cp_to_hp


class MsaSelfAttention(GroupedQueryAttention):
    """Select blocks with the index branch and attend to them exactly."""

    def __init__(self, config: MsaTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.index_branch = IndexBranch(config, kwargs["pg_collection"])

    def attend(self, inputs: AttentionInputs, context: PackContext, record: SelectionRecord) -> Tensor:
        """See GroupedQueryAttention.attend."""
        pack, index, k, v = context.pack, inputs.index, inputs.k, inputs.v
        assert index is not None, "index queries and keys were projected first"
        q_index, k_index = index.q, index.k
        if index.all_keys is None:
            # Zero gradients for the index branch, and not none: gradient hooks wait for every parameter.
            return cp_full_attention(inputs.q, k, v, self.full_attention_args(context), q_index, k_index)
        all_keys = index.layout.in_order(index.all_keys.wait())
        if context.attention is StageAttention.dense:
            return self._attend_densely(inputs, index, all_keys, context, record)
        # A recomputed layer finds its selection in the record: ties could otherwise fall another way.
        begun = None
        if record.block_indices is None:
            # What is known beforehand leaves before the scoring, or with every slice of it.
            begun = self._begin(inputs, index, context)
            fetch = begun if isinstance(begun, SlicedFetch) else None
            record.block_indices = self._select(q_index, all_keys, context, fetch)
        # With Ulysses groups queries have travelled under the scoring.
        q = inputs.q
        if context.recall is not None and not record.replaying:
            self._measure_recall(q, k, record.block_indices[context.recall.rows], context)
        if context.on_selection is not None and not record.replaying:
            context.on_selection(self.layer_number, record.block_indices)
        # Without a gradient there is no backward pass, and only that forms the loss.
        trains_index = context.kl_weight > 0 and torch.is_grad_enabled()
        block_size = self.config.attention.block_size
        needed = None
        # A recomputed call is given its decision, so nobody asks for needs again.
        if not record.replaying:
            if isinstance(begun, SlicedFetch):
                needed = begun.needed
            else:
                needed = needed_kv_blocks(record.block_indices, pack.layout.num_blocks)
            if isinstance(begun, EarlyGather):
                begun.selected(needed)
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
            on_kl=self._on_kl(context),
            settings=self.config.exchange,
            needed=needed,
            begun=begun,
            decision=record.exchange,
            kernel=self.config.attention.kernel,
        )
        out, decision = cp_sparse_attention(q, k, v, q_index, k_index, call)
        if needed is not None:
            self._count_selected(needed, context)
        self._record(decision, context, record)
        return out

    def start(self, hidden_states: Tensor, context: PackContext) -> PendingIndexKeys:
        """Project index queries and keys; the keys travel from here on, detached.

        Their gradients come back with those of KV blocks, or by a reduce-scatter in a dense stage.
        """
        q, k = self.index_branch(hidden_states, context.rotary)
        index = self.gather_index_keys(q, k, context)
        # Recomputed by itself, attention trades its queries itself, in both runs.
        if context.ulysses is not None and not self.is_recomputed:
            assert context.comm.ulysses is not None, "Ulysses inputs come with their group"
            comm = context.comm.ulysses.for_layer(self.layer_number)
            index.traded = start_cp_to_hp(q, comm, context.ulysses.order)
        return index

    def gather_index_keys(self, q: Tensor, k: Tensor, context: PackContext) -> PendingIndexKeys:
        """See GroupedQueryAttention.gather_index_keys."""
        if context.attention is StageAttention.dense and context.kl_weight == 0:
            return PendingIndexKeys(q, k, None, context.pack.layout)
        pending = context.comm.whole.for_layer(self.layer_number).start_all_gather(k.detach(), "index_key")
        return PendingIndexKeys(q, k, pending, context.pack.layout)

    def _attend_densely(
        self,
        inputs: AttentionInputs,
        index: PendingIndexKeys,
        all_keys: Tensor,
        context: PackContext,
        record: SelectionRecord,
    ) -> Tensor:
        """Attend fully; the index branch learns from all causal tokens."""
        q, k, v, q_index, k_index = inputs.q, inputs.k, inputs.v, index.q, index.k
        if context.recall is not None and not record.replaying:
            rows = context.recall.rows
            # Nothing is selected in a dense stage: only the sampled queries show what would be.
            selected = self._select_some(
                q_index.detach()[rows], all_keys, context, position=context.pack.position[rows]
            )
            self._measure_recall(q, k, selected, context)
        kl = IndexKl(
            all_keys=all_keys,
            weight=context.kl_weight,
            index_scale=q_index.shape[-1] ** -0.5,
            temperature=self.config.attention.kl_temperature,
            on_kl=self._on_kl(context),
            kernel=self.config.attention.kernel,
        )
        return cp_full_attention(q, k, v, self.full_attention_args(context, kl), q_index, k_index)

    def _begin(self, inputs: AttentionInputs, index: PendingIndexKeys, context: PackContext) -> Begun | None:
        """Begin the exchange before the scoring; None where all of it waits for the selection."""
        pack = context.pack
        waits = not pack.index.slices and self.config.kv_exchange is not KvExchange.all_gather
        if waits or pack.layout.cp_size == 1:
            return None
        return begin_exchange(
            self.config.kv_exchange,
            pack_blocks(inputs.k.detach(), inputs.v.detach(), self.config.attention.block_size),
            index.k.detach(),
            pack.layout,
            self.kv_comm(context),
            self.config.exchange,
            num_slices=max(1, len(pack.index.slices)),
            with_backward=torch.is_grad_enabled() and inputs.k.requires_grad,
        )

    def _on_kl(self, context: PackContext) -> Callable[[Tensor], None] | None:
        """Return what takes the KL loss's value, None in steps whose metrics leave it out."""
        if not context.with_kl_value:
            return None
        return lambda value: LayerStats.add(context.stats.kl, self.layer_number, value)

    def _select(
        self, q_index: Tensor, all_keys: Tensor, context: PackContext, fetch: SlicedFetch | None = None
    ) -> Tensor:
        """Select blocks [T, M, topk] for all local queries, some of which other ranks may compute.

        fetch: is told what each slice of queries selected; None: they select in one piece.

        Example: ranks hold tokens [(0, 4)] and [(4, 8)], and rank 0 computes (6, 8) for rank 1: it selects
        for rows 0 to 3 of its own from position 0 on and for two that arrived from position 6 on, and sends
        the last two selections back.
        """
        pack, comm = context.pack, self.kv_comm(context)
        q_index, moves = q_index.detach(), pack.index.moves
        if moves is not None:
            q_index = move_rows(q_index, moves.there, comm, "index_query")
        if fetch is not None:

            def select(rows: Tensor, ranges: Sequence[Range], valid: Tensor | None) -> Tensor:
                return self._select_ranges(rows, all_keys, context, ranges, valid)

            return select_in_slices(q_index, pack, comm, fetch, select, context.topk)
        valid = pack.valid if moves is None else None
        selected = self._select_ranges(q_index, all_keys, context, pack.index.ranges, valid)
        if moves is not None:
            # Whoever selected did not know which of these queries are padding.
            selected = move_rows(selected, moves.back, comm, "index_query")
            selected.masked_fill_(~pack.valid[:, None, None], -1)
        return selected

    def _select_ranges(
        self,
        q_index: Tensor,
        all_keys: Tensor,
        context: PackContext,
        ranges: Sequence[Range],
        valid: Tensor | None,
    ) -> Tensor:
        """Select blocks [n, M, topk] for queries [n, M, Di] at the positions of `ranges`, which ascend."""
        if len(ranges) > 1 and q_index.is_cuda:
            # One launch: the longest programs of all ranges begin first, and few rows need no second kernel.
            positions = [torch.arange(start, stop, device=q_index.device) for start, stop in ranges]
            return self._select_some(q_index, all_keys, context, valid=valid, position=torch.cat(positions))
        # The tiles of the path in torch span few blocks where positions are consecutive.
        parts, row = [], 0
        for start, stop in ranges:
            rows = slice(row, row + stop - start)
            part = None if valid is None else valid[rows]
            parts.append(self._select_some(q_index[rows], all_keys, context, start, valid=part))
            row = rows.stop
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _select_some(
        self,
        q_index: Tensor,
        all_keys: Tensor,
        context: PackContext,
        start: int = 0,
        *,
        valid: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Select blocks for queries [n, M, Di] at positions from `start` on, or at those in `position`.

        Returns [n, M, topk] int32 block ids of the pack, -1 for none; rows that are not `valid` select none.
        """
        attention = self.config.attention
        return select_blocks(
            q_index,
            all_keys,
            context.pack.cu_seqlens,
            block_size=attention.block_size,
            topk=context.topk,
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
        """Place values [M, ...] of this rank's KV heads among all: [num_kv_heads, ...], zero for the others.

        Example: 4 KV heads, tp_rank 1 of 2, Ulysses rank 1 of 2: M = 1, and the value stands at head 3.
        """
        # Zeros elsewhere, so that metrics can sum over ranks whatever heads each of them has.
        whole = values.new_zeros(self.config.model.num_kv_heads, *values.shape[1:])
        first = self.tp_rank * self.num_local_kv_heads + context.ulysses_rank * len(values)
        whole[first : first + len(values)] = values
        return whole

    def _count_selected(self, needed: Tensor, context: PackContext) -> None:
        """Count remote KV blocks per KV head: what `selected` would receive, whatever way is used.

        needed: [M, NB] bool, see `needed_kv_blocks`.
        """
        layout = context.pack.layout
        pairs = kv_blocks_by_owner(needed, layout).view(layout.cp_size, needed.shape[0], -1).sum((0, 2))
        LayerStats.add(context.stats.selected, self.layer_number, self._of_all_groups(pairs, context))

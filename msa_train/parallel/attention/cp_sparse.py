"""Attend from local queries to the blocks they selected, over a sequence that is split over ranks.

An MSA layer takes six steps. Steps 1 and 2 are the layer's (`model/attention/msa.py`), the others start here.

1. Gather index keys (`comm/cp_comm.py`): [T, Di] of each rank -> all_keys [S, Di]. They travel under the
   projections of queries, keys and values.
2. Select (`msa_kernels/select_blocks`): q_index [T, M, Di] and all_keys -> block_indices [T, M, topk].
   In slices of queries where there are many: steps 3 and 4 of a slice run while the next one is scored
   (`kv_exchange/slices/`), and an all-gather begins before the scoring.
3. Negotiate (`kv_exchange/requests.py`, `plan.py`): needed [M, NB] bool -> bitmaps [P, W] of every rank,
   all-gathered -> an ExchangeDecision, the same on all ranks, with a RankPlan of rows to send and receive.
4. Fetch (`kv_exchange/selected.py`, `all_gather.py`, `ring.py`): own KV blocks [M * NL, 2, B, D] go out,
   those of others come in [R, 2, B, D]. A session yields them as sources, own blocks first.
5. Attend (`msa_kernels/block_sparse_attention/tiled.py`): out [T, M, G, D] and lse [T, M, G] per source,
   while the next source is on its way; partial results are merged by log-sum-exp.
6. Return gradients (the session's `backward`): dkv and dk_index [R, 2 * B * D + B * Di] go back to the
   owners, which add them in rank order -> dk, dv [T, M, D] and dk_index [T, Di]. dq and dq_index need no
   travel.

Shapes: S tokens of the pack, P ranks, T = S / P local tokens, M KV heads, G query heads per KV head, D head
dim, Di index head dim, NB blocks of the pack, NL = NB / P blocks per rank, B block size, R fetched KV blocks,
W bytes of a bitmap of one rank's KV blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from msa_kernels.block_sparse_attention.across_pools import output_delta
from msa_kernels.block_sparse_attention.op import pack_blocks, unpack_blocks
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import KlTerm, PoolOutput, SparseQueries
from msa_kernels.block_sparse_attention.window import TokenWindow
from torch import Tensor

from msa_train.config import AttentionKernel, ExchangeConfig, KvExchange
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.kv_exchange.choose import negotiate_exchange, open_kv_session
from msa_train.parallel.kv_exchange.requests import ExchangeDecision, needed_kv_blocks
from msa_train.parallel.kv_exchange.session import KvBlockGrads, KvSource
from msa_train.parallel.kv_exchange.slices.begin import Begun, EarlyGather
from msa_train.parallel.kv_exchange.slices.sliced_fetch import SlicedFetch
from msa_train.parallel.sharding.shard_layout import ShardLayout


@dataclass(slots=True, frozen=True)
class SparseAttentionArgs:
    """Describe one call of a layer: everything but the differentiable tensors."""

    block_indices: Tensor
    "[T, M, topk] int32 block ids of the pack, -1 for none"
    position: Tensor
    "[T] int64 positions of the local tokens in the pack"
    layout: ShardLayout
    "the blocks of every rank"
    comm: KvComm
    "ranks between which KV blocks travel"
    exchange: KvExchange
    "way of the exchange, as configured"
    softmax_scale: float
    "factor of the attention scores"
    index_scale: float = 1.0
    "factor of the index scores in the KL loss"
    k_index: Tensor | None = None
    "[NB, B, Di] index keys of the whole pack, detached; None: no KL loss"
    kl_weight: float = 0.0
    "factor of the divergence summed over queries and KV heads; holds the division by their number"
    kl_temperature: float = 1.0
    "divides the logits of teacher and student in the divergence"
    on_kl: Callable[[Tensor], None] | None = None
    "receives this rank's unweighted sum of divergences (fp64, nats) in the backward pass; None: form none"
    settings: ExchangeConfig = field(default_factory=ExchangeConfig)
    "details of the exchange: fetching again, nodes, broadcast blocks"
    needed: Tensor | None = None
    "[M, NB] bool `needed_kv_blocks` of block_indices; None: computed where it is asked for"
    begun: Begun | None = None
    "exchange that began before the selection; None: it begins in the call"
    decision: ExchangeDecision | None = None
    "of the call that is recomputed; None: the ranks agree on one"
    window: TokenWindow | None = None
    "tokens of their blocks that local queries see (sliding window); None: all but the future"
    kernel: AttentionKernel = AttentionKernel.auto
    "implementation of the attention, forward and backward"


def cp_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, q_index: Tensor | None, k_index: Tensor | None, call: SparseAttentionArgs
) -> tuple[Tensor, ExchangeDecision]:
    """Attend from local queries to the blocks they selected, wherever these blocks are.

    The gradient of `q_index` and `k_index` is that of `call.kl_weight * KL`, whatever gradient reaches the
    output: the loss value itself is formed in the backward pass only, where its parts exist anyway.

    Args:
        q: [T, M, G, D] queries of this rank's tokens; fp64, fp32, fp16 or bf16.
        k: [T, M, D] keys, likewise.
        v: [T, M, D] values, likewise.
        q_index: [T, M, Di] index queries, likewise; None in layers without an index branch.
        k_index: [T, Di] index keys, likewise; None in layers without an index branch.
        call: see SparseAttentionArgs.

    Returns:
        [T, M, G, D] in q's dtype; and how the blocks came, to be given again where the layer is recomputed.

    Raises:
        ExchangeError: a rank's request does not fit, or a collective failed.
    """
    return _CpSparseAttention.apply(q, k, v, q_index, k_index, call)


class _CpSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_index: Tensor | None,
        k_index: Tensor | None,
        call: SparseAttentionArgs,
    ) -> tuple[Tensor, ExchangeDecision]:
        # Blocks lie whole in memory [M * NL, 2, B, D]: one KV block is one row of a message.
        begun = call.begun
        local = pack_blocks(k, v, call.layout.block_size) if begun is None else begun.local
        num_kv_heads, all_keys = k.shape[1], call.k_index
        if begun is not None:
            decision = begun.decide()
        else:
            decision = call.decision or _decide(local, k_index, ctx.needs_input_grad[0], call)
        session = open_kv_session(
            decision,
            local,
            num_kv_heads,
            call.layout,
            call.comm,
            call.settings,
            index_elements=0 if all_keys is None else all_keys[0].numel(),
            fetch=begun if isinstance(begun, SlicedFetch) else None,
            gathered=begun.gathered if isinstance(begun, EarlyGather) else None,
        )
        del local, begun
        queries, kernel = _queries(q, q_index, all_keys, call), call.kernel.value
        total: PoolOutput | None = None
        # Softmax over several sources: lse = log(sum_i e^lse_i), out = sum_i e^(lse_i - lse) out_i.
        for source in session.sources():
            block_table = source.block_table(call.block_indices)
            total = pool_forward(queries, source.pool, block_table, total=total, kernel=kernel)
        assert total is not None, "an exchange has at least one source"
        out = total.out.to(q.dtype)
        if decision.spoilt:
            # Selections by NaN keys are arbitrary. NaN on every rank lets all of them judge the step alike.
            out = torch.full_like(out, float("nan"))
        elif q_index is not None and k_index is not None:
            # Requests have told whether some rank's index keys are finite.
            known = decision.kind is KvExchange.selected
            _spoil_by(out, (q_index,) if known else (q_index, k_index))
        kept = session.release()
        ctx.save_for_backward(q, q_index, all_keys, out, total.lse, total.lse_index, total.lse_teacher, *kept)
        # All tensors are kept by autograd alone, which drops them where the layer is recomputed.
        ctx.session, ctx.call = session, replace(call, k_index=None, needed=None, begun=None)
        return out, decision

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _decision: None) -> tuple[Tensor | None, ...]:
        q, q_index, all_keys, out, lse, lse_index, lse_teacher, *kept = ctx.saved_tensors
        call: SparseAttentionArgs = ctx.call
        ctx.session.restore(kept)
        del kept
        queries = _queries(q, q_index, all_keys, call)
        # Softmax backward: ds_j = p_j (dout . v_j - sum_i p_i dout . v_i). The sum over all selected tokens,
        # wherever they lie, is dout . out = delta; so each source's ds needs nothing of the other sources.
        delta = output_delta(dout, out, kernel=call.kernel.value)
        term = None
        if lse_index is not None:
            # The teacher p is a constant. With student s = softmax(z) the loss sum p log(p / s) has the
            # gradient weight * (s - p) in z; both need only their merged log-sum-exp, see above.
            term = KlTerm(lse_index, call.kl_weight, lse_teacher, with_value=call.on_kl is not None)
        sums = _QuerySums()

        def compute(source: KvSource, rows: slice | None = None) -> KvBlockGrads:
            some = rows or slice(None)
            grads = pool_backward(
                _rows_of(queries, some),
                source.pool,
                source.block_table(call.block_indices[some]),
                dout[some],
                delta[some],
                lse[some],
                None if term is None else _rows_of_term(term, some),
                kernel=call.kernel.value,
            )
            sums.add(grads.dq, grads.dq_index, grads.kl, rows)
            return grads.dkv, grads.dk_index

        dkv, dk_index = ctx.session.backward(compute)
        ctx.session = None
        sums.end()
        # The loss value is for metrics alone: its gradient has just been formed.
        if call.on_kl is not None and sums.kl is not None:
            call.on_kl(sums.kl)
        assert sums.dq is not None, "an exchange has at least one source"
        num_kv_heads = q.shape[1]
        dk, dv = unpack_blocks(dkv.to(q.dtype), num_kv_heads)
        if q_index is None:
            return sums.dq.to(q.dtype), dk, dv, None, None, None
        if dk_index is None or sums.dq_index is None:
            # Zeros and not None: a frozen index branch must still look used to gradient hooks.
            width = q_index.shape[-1]
            return (
                sums.dq.to(q.dtype),
                dk,
                dv,
                torch.zeros_like(q_index),
                q_index.new_zeros(q.shape[0], width),
                None,
            )
        # All KV heads share one index key, so its gradient is the sum over them: [M * NL, B, Di] -> [T, Di].
        # The session has summed over ranks; over tensor-parallel ranks Megatron sums the weight's gradient.
        dk_index = dk_index.view(num_kv_heads, -1, *dk_index.shape[1:]).sum(0).flatten(0, 1)
        return (
            sums.dq.to(q.dtype),
            dk,
            dv,
            sums.dq_index.to(q_index.dtype),
            dk_index.to(q_index.dtype),
            None,
        )


def _spoil_by(out: Tensor, index: tuple[Tensor, ...]) -> None:
    """Make the output NaN in place where this rank's index queries or keys are not finite.

    What they select looks sound: without the KL loss, or by a kernel whose comparisons pass NaN over, nothing
    else would show it. Every exchange, and one rank alone, comes here; the host does not wait.
    """
    ends = torch.stack([torch.linalg.vector_norm(x, float("inf")) for x in index])
    out.masked_fill_(ends.isfinite().all().logical_not(), float("nan"))


class _QuerySums:
    """Sum query-side gradients over sources. Queries do not move, so no other rank has a share."""

    def __init__(self) -> None:
        self.dq: Tensor | None = None
        self.dq_index: Tensor | None = None
        self.kl: Tensor | None = None
        self._parts: list[tuple[Tensor, Tensor | None]] = []

    def add(self, dq: Tensor, dq_index: Tensor | None, kl: Tensor | None, rows: slice | None) -> None:
        """Add the gradients of all queries, or of some; the last of some brings the others with it."""
        if kl is not None:
            self.kl = kl if self.kl is None else self.kl.add_(kl)
        if rows is not None and self.dq is not None:
            # A view: rows of the sum.
            self.dq[rows].add_(dq)
            if dq_index is not None and self.dq_index is not None:
                self.dq_index[rows].add_(dq_index)
            return
        if rows is not None:
            self._parts.append((dq, dq_index))
            return
        self.dq = dq if self.dq is None else self.dq.add_(dq)
        if dq_index is not None:
            self.dq_index = dq_index if self.dq_index is None else self.dq_index.add_(dq_index)

    def end(self) -> None:
        """Join the gradients of slices of queries where no source gave those of all."""
        if self.dq is None:
            self.dq = torch.cat([dq for dq, _ in self._parts])
            index = [dq_index for _, dq_index in self._parts if dq_index is not None]
            self.dq_index = torch.cat(index) if index else None
        self._parts.clear()


def _rows_of(queries: SparseQueries, rows: slice) -> SparseQueries:
    """Take some of the queries: views."""
    if rows == slice(None):
        return queries
    window = queries.window
    return replace(
        queries,
        q=queries.q[rows],
        position=queries.position[rows],
        q_index=None if queries.q_index is None else queries.q_index[rows],
        window=None
        if window is None
        else replace(window, start=window.start[rows], sink_stop=window.sink_stop[rows]),
    )


def _rows_of_term(term: KlTerm, rows: slice) -> KlTerm:
    teacher = term.lse_teacher
    return replace(
        term, lse_index=term.lse_index[rows], lse_teacher=None if teacher is None else teacher[rows]
    )


def _decide(
    local: Tensor, k_index: Tensor | None, with_backward: bool, call: SparseAttentionArgs
) -> ExchangeDecision:
    """Ask the other ranks, or take the scheme that needs no asking."""
    if call.exchange not in (KvExchange.selected, KvExchange.auto):
        # Everything comes, whatever was selected.
        return ExchangeDecision(call.exchange)
    needed = call.needed
    if needed is None:
        needed = needed_kv_blocks(call.block_indices, call.layout.num_blocks)
    return negotiate_exchange(
        call.exchange,
        local,
        needed,
        call.layout,
        call.comm,
        call.settings,
        k_index=k_index,
        with_backward=with_backward,
    )


def _queries(
    q: Tensor, q_index: Tensor | None, all_keys: Tensor | None, call: SparseAttentionArgs
) -> SparseQueries:
    # The temperature divides the logits of both sides: the student's by its scale, the teacher's in the
    # kernel.
    return SparseQueries(
        q=q,
        position=call.position,
        softmax_scale=call.softmax_scale,
        q_index=None if all_keys is None else q_index,
        k_index=all_keys,
        index_scale=call.index_scale / call.kl_temperature,
        temperature=call.kl_temperature,
        window=call.window,
    )

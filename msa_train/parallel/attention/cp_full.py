"""Attend fully and causally within documents, over a sequence that is split over ranks.

Queries may first move to other ranks, so that all have equal work; outputs move back. Each rank's queries
then see keys of their own documents wherever these come from. In a dense warm-up stage the KL loss of an MSA
layer's index branch over the same tokens is computed in the backward pass, where keys are at hand.

Work grows with the square of a document: one of 1M tokens on 256 ranks costs each rank 2e9 (query, key) pairs
per query head. Nothing of the size of query heads times keys is held: the backward pass takes keys in pieces,
for which a kernel's own gradients per query head stay within 512 MiB.

Outputs of several calls are merged, and gradients added, in fp32, on this rank and over ranks
(`full_sums.py`, `kv_exchange/full.py`): at 64 ranks the error is that of one process in bf16
(benchmarks/results/full_attention_error.md).

Shapes: T local tokens, U queries computed here, K keys held here, M KV heads, G query heads per KV head, D
head dim, Di index head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from msa_kernels.full_attention.op import attention_backward, attention_forward, most_keys, takes_offset
from torch import Tensor

from msa_train.config import FullKernel, KvExchange
from msa_train.parallel.attention.dense_kl import DenseKl, IndexKl, TeacherLse
from msa_train.parallel.attention.full_spans import Piece, plan_pieces
from msa_train.parallel.attention.full_sums import GradSum, MergedOutput
from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.kv_exchange.full import KeySource, open_full_session
from msa_train.parallel.kv_exchange.full_plan import FullPlan
from msa_train.parallel.sharding.redistribute import redistribute, redistribute_back
from msa_train.parallel.sharding.shard_layout import ShardLayout, VisiblePart, visible_parts

FORWARD_PARTS = 8
"calls over which the keys of a source are spread in the forward pass, in 16 bits"
LEAST_KEYS = 1024
"keys below which a call is not worth its launch"


@dataclass(slots=True, frozen=True)
class FullAttentionArgs:
    """Describe one call of full attention: everything but the differentiable tensors."""

    plan: FullPlan
    "how the ranks share the attention over this pack"
    layout: ShardLayout
    "the tokens of every rank"
    comm: CpComm
    "ranks between which queries, keys and values travel"
    exchange: KvExchange
    "way of the exchange; `auto` means all-gather here, so it is decided before"
    softmax_scale: float
    "factor of the attention scores"
    kl: IndexKl | None = None
    "KL loss of an index branch; None: no loss"
    keep: bool = True
    "keep fetched keys and values for the backward pass; False: fetch them again"
    kernel: FullKernel = FullKernel.auto
    "implementation of the attention, forward and backward"


def cp_full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: FullAttentionArgs,
    q_index: Tensor | None = None,
    k_index: Tensor | None = None,
) -> Tensor:
    """Attend from this rank's tokens to all earlier tokens of their documents.

    With `call.kl`, q_index and k_index get the gradient of its weighted KL loss, whatever gradient reaches
    the output; without `call.kl` they get zeros.

    Args:
        q: [T, M, G, D] queries of this rank's tokens; fp64, fp32, fp16 or bf16.
        k: [T, M, D] keys, likewise.
        v: [T, M, D] values, likewise.
        call: see FullAttentionArgs.
        q_index: [T, M, Di] index queries, likewise; None without an index branch.
        k_index: [T, Di] index keys, likewise; None without an index branch.

    Returns:
        [T, M, G, D] in q's dtype; padding rows give 0.

    Raises:
        ExchangeError: a collective failed.
    """
    plan, comm = call.plan, call.comm
    q = redistribute(q, plan.queries, comm, "full_query")
    if q_index is not None and call.kl is not None:
        q_index = redistribute(q_index, plan.queries, comm, "full_query")
    # Keys and values in one message; only a ring moves them, other ways leave them where they are.
    kv = redistribute(torch.stack((k, v), dim=1), plan.keys, comm, "full_query")
    out = _CpFullAttention.apply(q, kv, q_index, k_index, call)
    return redistribute_back(out, plan.queries, comm, "full_query")


class _CpFullAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        q_index: Tensor | None,
        k_index: Tensor | None,
        call: FullAttentionArgs,
    ) -> Tensor:
        """Attend: q [U, M, G, D], kv [K, 2, M, D] -> [U, M, G, D]."""
        q = q.contiguous()
        merged = MergedOutput(q)
        teacher = TeacherLse(call.kl, q.permute(1, 2, 0, 3), merged.lse, call.softmax_scale)
        session = open_full_session(call.exchange, kv, call.plan, call.layout, call.comm, keep=call.keep)
        for source in session.sources():
            for piece in _pieces(call, source, q, _most_keys_forward(call, source, q)):
                for rows in piece.calls:
                    keys, values = rows.keys.take(source.kv[piece.rows]).unbind(1)
                    out, lse = attention_forward(
                        rows.queries.take(q), keys, values, rows.queries.limits, rows.keys.limits,
                        causal=rows.causal, softmax_scale=call.softmax_scale, kernel=call.kernel.value,
                    )  # fmt: skip
                    merged.add(rows.queries, out, lse)
            if teacher.own:
                for visible, keys, _ in _parts(call, source):
                    teacher.add(visible.rows, keys, causal=visible.causal)
        out = merged.finish()
        teacher_lse = teacher.lse if teacher.own else merged.lse
        ctx.save_for_backward(q, out, merged.lse, q_index, teacher_lse, *session.release())
        ctx.session, ctx.call, ctx.k_index_shape = session, call, None if k_index is None else k_index.shape
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, q_index, teacher_lse, *kept = ctx.saved_tensors
        call: FullAttentionArgs = ctx.call
        ctx.session.restore(tuple(kept))
        dout = dout.contiguous()
        dq = GradSum(q)
        # The loss joins the backward pass, where keys come by anyway and teacher probabilities are cheap.
        kl = None
        if call.kl is not None and q_index is not None:
            q_heads = q.permute(1, 2, 0, 3)
            kl = DenseKl(
                call.kl, call.layout, call.plan.segments, q_heads, q_index, teacher_lse, call.softmax_scale
            )

        def compute(source: KeySource, dtype: torch.dtype) -> Tensor:
            """Add to dq; return the gradient [n, 2, M, D] of the source's keys and values, in this dtype."""
            grad = torch.zeros(source.kv.shape, dtype=dtype, device=q.device)
            for piece in _pieces(call, source, q, most_keys(q)):
                kv = source.kv[piece.rows]
                sums = [GradSum(x) for x in kv.unbind(1)]
                for rows in piece.calls:
                    queries, (keys, values) = rows.queries, rows.keys.take(kv).unbind(1)
                    # out and lse are those over all keys, so each part has its true share of the softmax.
                    share, *parts = attention_backward(
                        queries.take(dout), queries.take(q), keys, values,
                        queries.take(out), queries.take(lse, dim=2), queries.limits, rows.keys.limits,
                        causal=rows.causal, softmax_scale=call.softmax_scale, kernel=call.kernel.value,
                    )  # fmt: skip
                    dq.add(queries, share)
                    for total, part in zip(sums, parts, strict=True):
                        total.add(rows.keys, part)
                for i, total in enumerate(sums):
                    grad[piece.rows, i] = total.finish()
            if kl is not None:
                for visible, keys, _ in _parts(call, source):
                    kl.add(visible.rows, visible.start, keys, causal=visible.causal)
            return grad

        dkv = ctx.session.backward(compute)
        ctx.session = None
        dq_index, dk_index = None, None
        if kl is not None:
            dq_index, dk_index = kl.finish(call.comm)
        elif q_index is not None:
            # Zeros and not None: gradient hooks wait for every parameter.
            dq_index, dk_index = torch.zeros_like(q_index), q_index.new_zeros(ctx.k_index_shape)
        return dq.finish().to(q.dtype), dkv, dq_index, dk_index, None


def _most_keys_forward(call: FullAttentionArgs, source: KeySource, q: Tensor) -> int | None:
    """Return how many keys a forward call should have at most, so that outputs are as exact as one process'.

    A kernel rounds each part's output to 16 bits. One part next to the final rounding makes the error 1.4
    times as large; of several parts over the same queries the roundings are independent and their mean is
    small: 1.04 times with many. Each part costs a pass over the fp32 outputs, .4 ms of an H100's memory for
    16,384 tokens of 64 heads (arithmetic).
    """
    if q.dtype in (torch.float32, torch.float64) or call.comm.size == 1:
        return None
    # all keys in one source and one call: nothing is merged
    if (
        call.exchange is not KvExchange.ring
        and len(source.ranges) == 1
        and takes_offset(q, call.kernel.value)
    ):
        start, stop = source.ranges[0]
        if (start, stop) == (0, call.layout.seq_len):
            return None
    return max(-(-source.kv.shape[0] // FORWARD_PARTS), LEAST_KEYS)


def _pieces(call: FullAttentionArgs, source: KeySource, q: Tensor, limit: int | None) -> list[Piece]:
    """Look up the kernel calls over a source, which all layers of a pack share."""
    known = call.plan.pieces
    key = (tuple(source.ranges), takes_offset(q, call.kernel.value), limit)
    if key not in known:
        known[key] = plan_pieces(call.plan.segments, source.ranges, takes_offset=key[1], most_keys=limit)
    return known[key]


def _parts(call: FullAttentionArgs, source: KeySource) -> Iterator[tuple[VisiblePart, Tensor, slice]]:
    """Yield what segments see of each range of a source: keys [M, n, D] and their rows."""
    for segment in call.plan.segments:
        for row, start, stop in source.places():
            for visible in visible_parts(segment, start, stop):
                # Ranges of a source follow one another in its rows, wherever they lie in the pack.
                place = slice(row + visible.start - start, row + visible.stop - start)
                yield visible, source.kv[place, 0].transpose(0, 1), place

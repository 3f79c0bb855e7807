"""Attend fully and causally within documents, over a sequence that is split over ranks.

Queries may first move to other ranks, so that all have equal work; outputs move back. Each rank's queries
then see keys of their own documents wherever these come from. In a dense warm-up stage the KL loss of an MSA
layer's index branch over the same tokens is computed in the backward pass, where keys are at hand.

Work grows with the square of a document: one of 1M tokens on 256 ranks costs each rank 2e9 (query, key) pairs
per query head.

Shapes: T local tokens, U queries computed here, K keys held here, M KV heads, G query heads per KV head, D
head dim, Di index head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from msa_kernels.full_attention.op import attention_part, attention_part_backward, merge_parts
from torch import Tensor

from msa_train.config import KvExchange
from msa_train.parallel.attention.dense_kl import DenseKl, IndexKl, TeacherLse
from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.kv_exchange.full import KeySource, open_full_session
from msa_train.parallel.kv_exchange.full_plan import FullPlan
from msa_train.parallel.sharding.redistribute import redistribute, redistribute_back
from msa_train.parallel.sharding.shard_layout import Segment, ShardLayout, VisiblePart, visible_parts


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
        q_heads = q.permute(1, 2, 0, 3)
        out = torch.zeros_like(q_heads)
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        # -inf: nothing seen yet, and what padding rows keep.
        lse = torch.full(out.shape[:-1], float("-inf"), dtype=lse_dtype, device=q.device)
        teacher = TeacherLse(call.kl, q_heads, lse, call.softmax_scale)
        session = open_full_session(call.exchange, kv, call.plan, call.layout, call.comm, keep=call.keep)
        begun: set[Segment] = set()
        for source in session.sources():
            for segment, visible, (keys, values), _ in _parts(call.plan.segments, source):
                rows = visible.rows
                part = attention_part(
                    q_heads[:, :, rows], keys, values,
                    causal=visible.causal, softmax_scale=call.softmax_scale,
                )  # fmt: skip
                # The first part that covers a whole segment needs no merging with the zeros it finds.
                if segment in begun or not visible.whole:
                    part = merge_parts(out[:, :, rows], lse[:, :, rows], *part)
                out[:, :, rows], lse[:, :, rows] = part
                begun.add(segment)
                teacher.add(rows, keys, causal=visible.causal)
        ctx.save_for_backward(q, out, lse, q_index, teacher.lse, *session.release())
        ctx.session, ctx.call, ctx.k_index_shape = session, call, None if k_index is None else k_index.shape
        return out.permute(2, 0, 1, 3)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, q_index, teacher_lse, *kept = ctx.saved_tensors
        call: FullAttentionArgs = ctx.call
        ctx.session.restore(tuple(kept))
        q_heads, dout = q.permute(1, 2, 0, 3), dout.permute(1, 2, 0, 3)
        dq = torch.zeros_like(q_heads)
        # The loss joins the backward pass, where keys come by anyway and teacher probabilities are cheap.
        kl = None
        if call.kl is not None and q_index is not None:
            kl = DenseKl(
                call.kl, call.layout, call.plan.segments, q_heads, q_index, teacher_lse, call.softmax_scale
            )

        def compute(source: KeySource) -> Tensor:
            """Add to dq; return the gradient [n, 2, M, D] of the source's keys and values."""
            grad = torch.zeros_like(source.kv)
            for _, visible, (keys, values), place in _parts(call.plan.segments, source):
                rows = visible.rows
                # out and lse are those over all keys, so each part has its true share of the softmax.
                share, dk, dv = attention_part_backward(
                    dout[:, :, rows].contiguous(), q_heads[:, :, rows], keys, values,
                    out[:, :, rows].contiguous(), lse[:, :, rows].contiguous(),
                    causal=visible.causal, softmax_scale=call.softmax_scale,
                )  # fmt: skip
                dq[:, :, rows] += share
                grad[place] += torch.stack((dk, dv)).permute(2, 0, 1, 3)
                if kl is not None:
                    kl.add(rows, visible.start, keys, causal=visible.causal)
            return grad

        dkv = ctx.session.backward(compute)
        ctx.session = None
        dq_index, dk_index = None, None
        if kl is not None:
            dq_index, dk_index = kl.finish(call.comm)
        elif q_index is not None:
            # Zeros and not None: gradient hooks wait for every parameter.
            dq_index, dk_index = torch.zeros_like(q_index), q_index.new_zeros(ctx.k_index_shape)
        return dq.permute(2, 0, 1, 3), dkv, dq_index, dk_index, None


def _parts(
    segments: list[Segment], source: KeySource
) -> Iterator[tuple[Segment, VisiblePart, tuple[Tensor, Tensor], slice]]:
    """Yield segments with what they see of a source: keys and values [M, n, D], and their rows in it."""
    for segment in segments:
        for row, start, stop in source.places():
            for visible in visible_parts(segment, start, stop):
                # Ranges of a source follow one another in its rows, wherever they lie in the pack.
                place = slice(row + visible.start - start, row + visible.stop - start)
                keys, values = source.kv[place].permute(1, 2, 0, 3).unbind(0)
                yield segment, visible, (keys, values), place

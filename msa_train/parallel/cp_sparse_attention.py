"""Block-sparse attention over a sequence that is split over ranks, with the KL loss of its index branch.

Shapes: T local tokens, M KV groups, G query heads per group, D head dim, Di index head dim, NB blocks of the
pack, B block size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from msa_kernels.block_sparse_attention.op import pack_blocks, unpack_blocks
from msa_kernels.block_sparse_attention.pool import (
    KlTerm,
    PoolOutput,
    SparseQueries,
    pool_backward,
    pool_forward,
)
from msa_kernels.block_sparse_attention.window import TokenWindow
from msa_kernels.full_attention.op import merge_parts
from torch import Tensor

from msa_train.config import AttentionKernel, ExchangeConfig, KvExchange
from msa_train.parallel.block_requests import BlockRequests, needed_pairs
from msa_train.parallel.collectives import CpComm
from msa_train.parallel.exchange_session import KvSource, PairGrads
from msa_train.parallel.kv_exchange import agree, open_session
from msa_train.parallel.layout import ShardLayout


@dataclass(slots=True)
class SparseCall:
    """One call of a layer: everything but the differentiable tensors.

    block_indices: [T, M, topk] int32 global block ids, -1 for none.
    position: [T] int64, positions of the local tokens in the pack.
    k_index: [NB, B, Di] index keys of the whole pack, detached; None leaves the KL loss out.
    kl_weight: factor of sum over queries and groups of the divergence.
    kl_temperature: divides the logits of teacher and student in the divergence.
    on_kl: receives this rank's unweighted sum of divergences (fp64 scalar) in the backward pass.
    settings: how the exchange goes about it.
    needed: [M, NB] bool, `needed_pairs` of block_indices; None: computed where it is asked for.
    requests: agreed block requests; filled by the first call and reused when the layer is recomputed.
    window: which tokens of their blocks the local queries see, for sliding windows; None: all but the future.
    kernel: implementation of the attention, forward and backward.
    """

    block_indices: Tensor
    position: Tensor
    layout: ShardLayout
    comm: CpComm
    exchange: KvExchange
    softmax_scale: float
    index_scale: float = 1.0
    k_index: Tensor | None = None
    kl_weight: float = 0.0
    kl_temperature: float = 1.0
    on_kl: Callable[[Tensor], None] | None = None
    settings: ExchangeConfig = field(default_factory=ExchangeConfig)
    needed: Tensor | None = None
    requests: BlockRequests | None = None
    window: TokenWindow | None = None
    kernel: AttentionKernel = AttentionKernel.auto


def cp_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, q_index: Tensor | None, k_index: Tensor | None, call: SparseCall
) -> Tensor:
    """Attention of local queries over the blocks they selected, wherever these blocks are.

    The gradient of `q_index` and `k_index` is that of `call.kl_weight * KL`, whatever gradient reaches the
    output: the loss value itself is formed in the backward pass only, where its parts exist anyway.

    Args:
        q: [T, M, G, D]; k, v: [T, M, D], this rank's tokens.
        q_index: [T, M, Di]; k_index: [T, Di], this rank's tokens; None in layers without an index branch.
        call: see SparseCall.

    Returns:
        [T, M, G, D] in q's dtype.
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
        call: SparseCall,
    ) -> Tensor:
        local = pack_blocks(k, v, call.layout.block_size)
        num_groups, all_keys = k.shape[1], call.k_index
        if call.requests is None:
            call.requests = _agree(local, k_index, ctx.needs_input_grad[0], call)
        session = open_session(
            call.requests,
            local,
            num_groups,
            call.layout,
            call.comm,
            call.settings,
            index_elements=0 if all_keys is None else all_keys[0].numel(),
        )
        del local
        queries, kernel = _queries(q, q_index, all_keys, call), call.kernel.value
        total: PoolOutput | None = None
        for source in session.sources():
            part = pool_forward(queries, source.pool, source.entries(call.block_indices), kernel=kernel)
            total = part if total is None else _merge(total, part)
        assert total is not None, "an exchange has at least one source"
        out = total.out.to(q.dtype)
        if call.requests.spoilt:
            out = torch.full_like(out, float("nan"))
        elif q_index is not None and k_index is not None:
            _spoil_by(out, q_index, k_index)
        kept = session.hand_over()
        ctx.save_for_backward(q, q_index, all_keys, out, total.lse, total.lse_index, total.lse_teacher, *kept)
        # All tensors are kept by autograd alone, which drops them where the layer is recomputed.
        ctx.session, ctx.call = session, replace(call, k_index=None, needed=None)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, q_index, all_keys, out, lse, lse_index, lse_teacher, *kept = ctx.saved_tensors
        call: SparseCall = ctx.call
        ctx.session.take_back(kept)
        del kept
        queries = _queries(q, q_index, all_keys, call)
        dout = dout.to(queries.compute_dtype)
        delta = (dout * out).sum(-1)
        term = None
        if lse_index is not None:
            term = KlTerm(lse_index=lse_index, weight=call.kl_weight, lse_teacher=lse_teacher)
        sums = _QuerySums()

        def compute(source: KvSource) -> PairGrads:
            entries = source.entries(call.block_indices)
            grads = pool_backward(
                queries, source.pool, entries, dout, delta, lse, term, kernel=call.kernel.value
            )
            sums.add(grads.dq, grads.dq_index, grads.kl)
            return grads.dkv, grads.dk_index

        dkv, dk_index = ctx.session.backward(compute)
        ctx.session = None
        if call.on_kl is not None and sums.kl is not None:
            call.on_kl(sums.kl)
        assert sums.dq is not None, "an exchange has at least one source"
        num_groups = q.shape[1]
        dk, dv = unpack_blocks(dkv.to(q.dtype), num_groups)
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
        dk_index = dk_index.view(num_groups, -1, *dk_index.shape[1:]).sum(0).flatten(0, 1)
        return (
            sums.dq.to(q.dtype),
            dk,
            dv,
            sums.dq_index.to(q_index.dtype),
            dk_index.to(q_index.dtype),
            None,
        )


def _spoil_by(out: Tensor, q_index: Tensor, k_index: Tensor) -> None:
    """Make the output NaN in place where this rank's index queries or keys are not finite.

    What they select looks sound: without the KL loss, or by a kernel whose comparisons pass NaN over, nothing
    else would show it. Every exchange, and one rank alone, comes here; the host does not wait.
    """
    ends = torch.stack([torch.linalg.vector_norm(x, float("inf")) for x in (q_index, k_index)])
    out.masked_fill_(ends.isfinite().all().logical_not(), float("nan"))


class _QuerySums:
    """Query-side gradients summed over sources."""

    def __init__(self) -> None:
        self.dq: Tensor | None = None
        self.dq_index: Tensor | None = None
        self.kl: Tensor | None = None

    def add(self, dq: Tensor, dq_index: Tensor | None, kl: Tensor | None) -> None:
        self.dq = dq if self.dq is None else self.dq.add_(dq)
        if dq_index is not None:
            self.dq_index = dq_index if self.dq_index is None else self.dq_index.add_(dq_index)
        if kl is not None:
            self.kl = kl if self.kl is None else self.kl.add_(kl)


def _agree(local: Tensor, k_index: Tensor | None, with_backward: bool, call: SparseCall) -> BlockRequests:
    """Ask the other ranks, or take the scheme that needs no asking."""
    needed = call.needed
    if needed is None:
        needed = needed_pairs(call.block_indices, call.layout.num_blocks)
    return agree(
        call.exchange,
        local,
        needed,
        call.layout,
        call.comm,
        call.settings,
        k_index=k_index,
        with_backward=with_backward,
    )


def _queries(q: Tensor, q_index: Tensor | None, all_keys: Tensor | None, call: SparseCall) -> SparseQueries:
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


def _merge(a: PoolOutput, b: PoolOutput) -> PoolOutput:
    out, lse = merge_parts(a.out, a.lse, b.out, b.lse)
    return PoolOutput(
        out=out,
        lse=lse,
        lse_index=_logaddexp(a.lse_index, b.lse_index),
        lse_teacher=_logaddexp(a.lse_teacher, b.lse_teacher),
    )


def _logaddexp(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.logaddexp(a, b)

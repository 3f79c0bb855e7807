"""Dense causal attention over a sequence that is split over ranks, document by document.

Queries of a shard see keys of their own document in the shard (causal) and, for the shard's first document,
on earlier ranks (all of them in the past). With `selected` only those prefixes travel. While the index branch
of an MSA layer warms up, its KL loss over the same tokens is computed in the backward pass, where keys are at
hand.

Shapes: T local tokens, M KV groups, G query heads per group, D head dim, P ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from msa_kernels.full_attention.op import attention_part, attention_part_backward, merge_parts
from torch import Tensor

from msa_train.config import KvExchange
from msa_train.parallel.collectives import CpComm
from msa_train.parallel.cp_dense_kl import DenseKl, IndexKl, TeacherLse
from msa_train.parallel.layout import Segment, ShardLayout, prefix_range


@dataclass(slots=True)
class FullCall:
    """One call of a dense layer: everything but the differentiable tensors.

    segments: document parts on this rank. send, receive: prefix tokens to and from each rank
    (`layout.prefix_splits`). kl: the KL loss of an index branch, None without.
    """

    segments: list[Segment]
    send: list[int]
    receive: list[int]
    layout: ShardLayout
    comm: CpComm
    exchange: KvExchange
    softmax_scale: float
    kl: IndexKl | None = None


# Computes the gradient of keys/values at positions [start, start + n), given them: [n, 2, M, D] both.
_PrefixGrad = Callable[[int, Tensor], Tensor]


def cp_full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: FullCall,
    q_index: Tensor | None = None,
    k_index: Tensor | None = None,
) -> Tensor:
    """q [T, M, G, D], k, v [T, M, D] of this rank's tokens -> [T, M, G, D]; padding rows give 0.

    With `call.kl`, q_index [T, M, Di] and k_index [T, Di] get the gradient of its weighted KL loss, whatever
    gradient reaches the output; without `call.kl` they get zeros.
    """
    return _CpFullAttention.apply(q, k, v, q_index, k_index, call)


class _CpFullAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_index: Tensor | None,
        k_index: Tensor | None,
        call: FullCall,
    ) -> Tensor:
        start = call.layout.start
        q_heads, k_heads, v_heads = q.permute(1, 2, 0, 3), k.transpose(0, 1), v.transpose(0, 1)
        out = torch.zeros_like(q_heads)
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.full(out.shape[:-1], float("-inf"), dtype=lse_dtype, device=q.device)
        teacher = TeacherLse(call.kl, q_heads, lse, call.softmax_scale)
        for segment in call.segments:
            rows = slice(segment.start - start, segment.stop - start)
            out[:, :, rows], lse[:, :, rows] = attention_part(
                q_heads[:, :, rows], k_heads[:, rows], v_heads[:, rows],
                causal=True, softmax_scale=call.softmax_scale,
            )  # fmt: skip
            teacher.add(rows, k_heads[:, rows], causal=True)
        kv = torch.stack((k, v), dim=1)
        exchange = _PrefixExchange(kv, call)
        for piece_start, piece in exchange.pieces():
            rows, keys = _visible(call, piece_start, piece)
            if keys.shape[0] == 0:
                continue
            part = attention_part(
                q_heads[:, :, rows], keys[:, 0].transpose(0, 1), keys[:, 1].transpose(0, 1),
                causal=False, softmax_scale=call.softmax_scale,
            )  # fmt: skip
            out[:, :, rows], lse[:, :, rows] = merge_parts(out[:, :, rows], lse[:, :, rows], *part)
            teacher.add(rows, keys[:, 0].transpose(0, 1), causal=False)
        ctx.save_for_backward(q, k, v, out, lse, q_index, teacher.lse)
        ctx.exchange, ctx.call = exchange, call
        return out.permute(2, 0, 1, 3)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, q_index, teacher_lse = ctx.saved_tensors
        call: FullCall = ctx.call
        q_heads, k_heads, v_heads = q.permute(1, 2, 0, 3), k.transpose(0, 1), v.transpose(0, 1)
        dout = dout.permute(1, 2, 0, 3)
        dq = torch.zeros_like(q_heads)
        dkv = torch.zeros(k.shape[0], 2, *k.shape[1:], dtype=k.dtype, device=k.device)

        def part(rows: slice, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
            """Adds to dq; returns the gradient of keys and values [n, 2, M, D]."""
            share, dk, dv = attention_part_backward(
                dout[:, :, rows].contiguous(), q_heads[:, :, rows], keys, values,
                out[:, :, rows].contiguous(), lse[:, :, rows].contiguous(),
                causal=causal, softmax_scale=call.softmax_scale,
            )  # fmt: skip
            dq[:, :, rows] += share
            return torch.stack((dk, dv)).permute(2, 0, 1, 3)

        kl = None
        if call.kl is not None and q_index is not None:
            kl = DenseKl(
                call.kl, call.layout, call.segments, q_heads, q_index, teacher_lse, call.softmax_scale
            )
        for segment in call.segments:
            rows = slice(segment.start - call.layout.start, segment.stop - call.layout.start)
            dkv[rows] += part(rows, k_heads[:, rows], v_heads[:, rows], True)
            if kl is not None:
                kl.add(rows, segment.start, k_heads[:, rows], causal=True)

        def prefix(piece_start: int, piece: Tensor) -> Tensor:
            grad = torch.zeros_like(piece)
            rows, keys = _visible(call, piece_start, piece)
            if keys.shape[0]:
                skipped = piece.shape[0] - keys.shape[0]
                grad[skipped:] = part(rows, keys[:, 0].transpose(0, 1), keys[:, 1].transpose(0, 1), False)
                if kl is not None:
                    kl.add(rows, piece_start + skipped, keys[:, 0].transpose(0, 1), causal=False)
            return grad

        dkv += ctx.exchange.backward(prefix)
        ctx.exchange = None
        dq_index, dk_index = _zeros(q_index) if kl is None else kl.finish(call.comm)
        return dq.permute(2, 0, 1, 3), dkv[:, 0], dkv[:, 1], dq_index, dk_index, None


def _zeros(q_index: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of index queries and keys without a loss."""
    if q_index is None:
        return None, None
    return torch.zeros_like(q_index), torch.zeros_like(q_index[:, 0])


def _visible(call: FullCall, piece_start: int, piece: Tensor) -> tuple[slice, Tensor]:
    """Local rows of the first document and the end of `piece` that they see; pieces of the future: none."""
    first, last = prefix_range(call.segments, call.layout.start)
    if first == last or piece_start >= last:
        return slice(0, 0), piece[:0]
    stop = call.segments[0].stop - call.layout.start
    return slice(0, stop), piece[max(0, first - piece_start) :]


class _PrefixExchange:
    """Brings keys and values of earlier ranks; kv: [T, 2, M, D] of this rank."""

    def __init__(self, kv: Tensor, call: FullCall) -> None:
        self.kv, self.call, self.comm = kv, call, call.comm
        self.rank, self.size = call.layout.cp_rank, call.layout.cp_size
        self._prefix: Tensor | None = None

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Remote pieces: (position of the first token, [n, 2, M, D])."""
        if self.call.exchange is KvExchange.selected:
            self._prefix = self._fetch()
            yield self.call.layout.start - self._prefix.shape[0], self._prefix
        elif self.call.exchange is KvExchange.all_gather:
            yield 0, self._gather("full_kv")
        else:
            yield from self._ring()

    def backward(self, grad: _PrefixGrad) -> Tensor:
        """Gradient of this rank's own kv from all ranks' queries on other ranks: [T, 2, M, D]."""
        length = self.call.layout.local_seq_len
        if self.call.exchange is KvExchange.selected:
            assert self._prefix is not None, "the backward follows the forward"
            return self._give_back(grad(self.call.layout.start - self._prefix.shape[0], self._prefix))
        if self.call.exchange is KvExchange.all_gather:
            gathered = self._gather("full_kv_again")
            total = torch.zeros(self.size * length, *gathered.shape[1:], dtype=gathered.dtype)
            total = total.to(gathered.device)
            total[: gathered.shape[0]] = grad(0, gathered)
            shards = total.view(self.size, length, *total.shape[1:])
            return self.comm.reduce_scatter(shards, "full_kv_grad")
        return self._ring_backward(grad)

    def _fetch(self) -> Tensor:
        send = self.call.send
        payload = torch.cat([self.kv[self.kv.shape[0] - n :] for n in send])
        return self.comm.all_to_all(payload, send, self.call.receive, "full_kv")

    def _give_back(self, dprefix: Tensor) -> Tensor:
        send, total = self.call.send, torch.zeros_like(self.kv)
        returned = self.comm.all_to_all(dprefix, self.call.receive, send, "full_kv_grad")
        for rows in returned.split(send):
            total[total.shape[0] - rows.shape[0] :] += rows
        return total

    def _gather(self, purpose: str) -> Tensor:
        """Keys and values of all earlier ranks; the later ones are not visible and cut off."""
        return self.comm.all_gather(self.kv, purpose).flatten(0, 1)[: self.call.layout.start]

    def _ring(self) -> Iterator[tuple[int, Tensor]]:
        held = self.kv
        for step in range(1, self.size):
            (held,) = self.comm.shift([held], "full_kv").wait()
            yield (self.rank - step) % self.size * self.call.layout.local_seq_len, held

    def _ring_backward(self, grad: _PrefixGrad) -> Tensor:
        held, total = self.kv, torch.zeros_like(self.kv)
        for step in range(1, self.size):
            (held,) = self.comm.shift([held], "full_kv_again").wait()
            (total,) = self.comm.shift([total], "full_kv_grad").wait()
            total = total + grad((self.rank - step) % self.size * self.call.layout.local_seq_len, held)
        (total,) = self.comm.shift([total], "full_kv_grad").wait()
        return total

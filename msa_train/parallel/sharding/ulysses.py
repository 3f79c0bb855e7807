"""Trade tokens for KV heads between neighbouring ranks: the head-parallel inner part of context parallelism.

Before attention each of h ranks holds T tokens with all M KV heads; after `cp_to_hp` it holds the h * T
tokens of all h ranks with M / h heads. Selection, teacher and exchange then stay inside a KV head, and the
exchange of KV blocks runs between the ranks that hold the same heads. `hp_to_cp` brings outputs back.

A trade brings a rank (h - 1) / h of its bytes: of queries, keys, values and index queries 76 MiB at 1M tokens
on 256 ranks (T = 4,096; 64 query heads, M = 4, D = Di = 128, bf16), of outputs 64 MiB, whatever h is.

Shapes: T tokens of one rank, M KV heads, h ranks of a Ulysses group (`cp_head_size`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa_train.parallel.comm.cp_comm import CpComm, Pending
from msa_train.parallel.sharding.partition import SequencePartition

# See `token_order`.
Order = tuple[Tensor, Tensor] | None
_Spread = Callable[[Tensor, CpComm, str], Tensor]


def token_order(plan: SequencePartition, first_rank: int, num_ranks: int) -> tuple[Tensor, Tensor] | None:
    """Sort tokens gathered by rank into the order of the pack, on the host; None where they are in it.

    Returns:
        [h * T] int64 rows in that order, and the inverse.

    Example: zigzag over 2 ranks, positions 0 1 6 7 and 2 3 4 5 -> ([0 1 4 5 6 7 2 3], [0 1 6 7 2 3 4 5]).
    """
    ranges = [r for rank in range(first_rank, first_rank + num_ranks) for r in plan.ranges[rank]]
    position = torch.cat([torch.arange(start, stop) for start, stop in ranges])
    # Selection and layouts count on ascending positions, which gathered zigzag shards do not have.
    order = position.argsort()
    if torch.equal(order, torch.arange(len(order))):
        return None
    return order, order.argsort()


def cp_to_hp(x: Tensor, comm: CpComm, order: Order = None) -> Tensor:
    """Trade tokens for KV heads: [T, M, ...] -> [h * T, M / h, ...]; chunk r of heads goes to rank r.

    Args:
        x: [T, M, ...] of this rank's tokens.
        comm: of the Ulysses group.
        order: see `token_order`.

    Raises:
        ExchangeError: the all-to-all failed; so below.

    Example: h = 2, KV heads a to d: rank 0 ends with all tokens of a and b, rank 1 with all of c and d.
    """
    return _reordered(_Trade.apply(x, comm, _spread_groups, _spread_tokens), order, 0)


@dataclass(slots=True)
class PendingTrade:
    """Hold what a started `cp_to_hp` will bring."""

    traded: Tensor
    "[h * T, M / h, ...] as it arrives"
    pending: Pending[Tensor]
    "of the all-to-all"
    order: Order
    "see `token_order`"

    def wait(self) -> Tensor:
        """Wait for all tokens: [h * T, M / h, ...].

        Raises:
            ExchangeError: the all-to-all failed.
        """
        self.pending.wait()
        return _reordered(self.traded, self.order, 0)


def start_cp_to_hp(x: Tensor, comm: CpComm, order: Order = None) -> PendingTrade:
    """Begin `cp_to_hp`; what is computed until `wait` hides it. Its gradient returns as of `cp_to_hp`."""
    started: list[Pending[Tensor]] = []
    traded = _StartTrade.apply(x, comm, started)
    return PendingTrade(traded, started[0], order)


def hp_to_cp(x: Tensor, comm: CpComm, order: Order = None) -> Tensor:
    """Trade back: [h * T, M / h, ...] -> [T, M, ...], the inverse of `cp_to_hp`."""
    return _Trade.apply(_reordered(x, order, 1), comm, _spread_tokens, _spread_groups)


def gather_tokens(x: Tensor, comm: CpComm, order: Order = None) -> Tensor:
    """Gather tokens of all ranks of the Ulysses group: [T, ...] -> [h * T, ...].

    Each rank uses them for its own KV heads, so gradients are summed over the group.
    """
    return _reordered(_GatherTokens.apply(x, comm), order, 0)


def _reordered(x: Tensor, order: Order, way: int) -> Tensor:
    return x if order is None else x[order[way]]


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: CpComm, there: _Spread, back: _Spread) -> Tensor:
        # All-to-all is a permutation of numbers over ranks, so its gradient is the trade back.
        ctx.comm, ctx.back = comm, back
        return there(x, comm, "heads")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.comm, "heads_grad"), None, None, None


class _StartTrade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: CpComm, started: list[Pending[Tensor]]) -> Tensor:
        ctx.comm = comm
        num_tokens, num_kv_heads = x.shape[:2]
        out = x.new_empty(comm.size * num_tokens, num_kv_heads // comm.size, *x.shape[2:])
        rows = [num_tokens] * comm.size
        started.append(comm.start_all_to_all(_chunks(x, comm), rows, rows, "heads", out))
        # Nobody reads it before `PendingTrade.wait`.
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _spread_tokens(grad, ctx.comm, "heads_grad"), None, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: CpComm) -> Tensor:
        ctx.comm = comm
        return comm.all_gather(x, "index_key").flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The shared index key got a gradient from each rank's KV heads: their sum goes to the token's rank.
        shards = grad.view(ctx.comm.size, -1, *grad.shape[1:])
        return ctx.comm.reduce_scatter(shards, "index_key_grad"), None


def _spread_groups(x: Tensor, comm: CpComm, purpose: str) -> Tensor:
    """Send heads apart: [T, M, ...] -> [h * T, M / h, ...].

    Example: h = 2, rows (tokens) 0 and 1 of heads a and b: rank 0 sends itself [0a, 1a] and rank 1 [0b, 1b].
    """
    rows = [x.shape[0]] * comm.size
    return comm.all_to_all(_chunks(x, comm), rows, rows, purpose)


def _chunks(x: Tensor, comm: CpComm) -> Tensor:
    """Lay out the heads of each rank one after the other: [T, M, ...] -> [h * T, M / h, ...]."""
    num_tokens, num_kv_heads = x.shape[:2]
    chunks = x.view(num_tokens, comm.size, num_kv_heads // comm.size, *x.shape[2:]).transpose(0, 1)
    return chunks.reshape(comm.size * num_tokens, *chunks.shape[2:])


def _spread_tokens(x: Tensor, comm: CpComm, purpose: str) -> Tensor:
    """Send tokens apart: [h * T, M / h, ...] -> [T, M, ...]; heads lie in the order of ranks."""
    num_tokens = x.shape[0] // comm.size
    rows = [num_tokens] * comm.size
    chunks = comm.all_to_all(x, rows, rows, purpose).view(comm.size, num_tokens, *x.shape[1:])
    return chunks.transpose(0, 1).flatten(1, 2)

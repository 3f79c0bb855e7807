"""Move rows of tokens from the ranks of one partition to those of another; the gradient moves back.

Only what changes its rank is sent, to up to P - 1 ranks; index lists take 8 bytes for each row kept, sent or
received.

Shapes: T rows that a rank has before, U rows that it has after, P ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.sharding.partition import Range, SequencePartition, common, count, rows_in

# Per rank, ascending.
Ranges = Sequence[Sequence[Range]]


@dataclass(slots=True)
class TokenMoves:
    """Hold what one rank keeps, sends and receives.

    Example: rank 0 of `plan_redistribution`'s example: num_before 4, num_after 6, kept rows 0 to 3 -> 0 to 3,
    nothing sent, received [4, 5], receive [0, 2].
    """

    num_before: int
    "rows before, T"
    num_after: int
    "rows after, U"
    kept: tuple[Tensor, Tensor]
    "[K] int64 rows before that stay, and the rows after that they become"
    sent: Tensor
    "[sum(send)] int64 rows before, by destination"
    send: list[int]
    "[P] rows to each rank"
    received: Tensor
    "[sum(receive)] int64 rows after, by source"
    receive: list[int]
    "[P] rows from each rank"
    in_order: bool
    "what is received is all there is after, row after row"


@dataclass(slots=True)
class Redistribution:
    """Hold both ways between the partition that tokens are held by and the one they are computed by."""

    there: TokenMoves
    "from where they are held"
    back: TokenMoves
    "to where they are held"


def plan_redistribution(home: SequencePartition, away: SequencePartition, rank: int) -> Redistribution | None:
    """Plan the moves of one rank, on the host; None where no token of any rank moves.

    Example: rows of [(0, 4)] and [(4, 8)] to [(0, 4), (6, 8)] and [(4, 6)]: rank 1 keeps rows 0, 1 and sends
    rows 2, 3 to rank 0, where they become rows 4, 5.
    """
    if home.ranges == away.ranges:
        return None
    there = make_moves(home.ranges, away.ranges, rank)
    return Redistribution(there, make_moves(away.ranges, home.ranges, rank))


def make_moves(before: Ranges, after: Ranges, rank: int) -> TokenMoves:
    """Plan the moves of one rank, on the host; ranks to which `after` gives the same position get copies.

    Example: rows of [(0, 4)] and [(4, 8)] to [] and [(2, 4)]: rank 0 has sent [2, 3], send [0, 2]; rank 1 has
    received [0, 1], receive [2, 0], in order.
    """
    mine, next_mine, ranks = before[rank], after[rank], range(len(before))
    nothing: list[Range] = []
    leaving = [nothing if r == rank else common(mine, after[r]) for r in ranks]
    coming = [nothing if r == rank else common(before[r], next_mine) for r in ranks]
    # Rows that stay are copied here and not sent: most of them where queries move to balance work.
    staying = common(mine, next_mine)
    arriving = [rows for parts in coming for rows in rows_in(parts, next_mine)]
    return TokenMoves(
        num_before=count(mine),
        num_after=count(next_mine),
        kept=(_indices(rows_in(staying, mine)), _indices(rows_in(staying, next_mine))),
        sent=_indices([rows for parts in leaving for rows in rows_in(parts, mine)]),
        send=[count(parts) for parts in leaving],
        received=_indices(arriving),
        receive=[count(parts) for parts in coming],
        in_order=not staying and arriving == sorted(arriving),
    )


def busiest_rank(before: Ranges, after: Ranges) -> int:
    """Find the most rows that a rank sends or receives, from one product over the pieces between all edges.

    At 256 ranks with some 1,000 edges 0.03 s (measured); 65,536 pairs of lists one by one took 1 s.

    Example: one document of 12 tokens on 3 ranks, each to see all before it: rank 0 sends 4 rows twice, rank
    2 receives 8 -> 8.
    """
    edges = np.unique([edge for parts in (*before, *after) for part in parts for edge in part])
    if edges.size < 2:
        return 0
    # Whole numbers below 2^53: exact in floating point, whose products are fast.
    moved = _covers(before, edges) * np.diff(edges) @ _covers(after, edges).T
    np.fill_diagonal(moved, 0)
    return int(max(moved.sum(0).max(), moved.sum(1).max()))


def _covers(ranges: Ranges, edges: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Mark the pieces between edges that each rank has: [P, edges - 1], 1 or 0."""
    marks = np.zeros((len(ranges), len(edges)))
    for rank, parts in enumerate(ranges):
        for start, stop in parts:
            marks[rank, np.searchsorted(edges, start)] += 1
            marks[rank, np.searchsorted(edges, stop)] -= 1
    return marks.cumsum(1)[:, :-1]


def _indices(ranges: Sequence[Range]) -> Tensor:
    parts = [torch.arange(start, stop) for start, stop in ranges]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def move_rows(x: Tensor, moves: TokenMoves, comm: CpComm, purpose: str) -> Tensor:
    """Move rows [T, ...] -> [U, ...], without a gradient. Every rank must call it.

    Raises:
        ExchangeError: the all-to-all failed.
    """
    arrived = comm.all_to_all(x[moves.sent], moves.send, moves.receive, purpose)
    result = x.new_empty(moves.num_after, *x.shape[1:])
    before, after = moves.kept
    # Both writes together fill every row once.
    result[after] = x[before]
    result[moves.received] = arrived
    return result


def redistribute(x: Tensor, moves: Redistribution | None, comm: CpComm, purpose: str) -> Tensor:
    """Move rows [T, ...] -> [U, ...]; x itself without moves. Gradients return as `{purpose}_grad`."""
    if moves is None:
        return x
    return _Redistribute.apply(x, moves.there, moves.back, comm, purpose)


def redistribute_back(x: Tensor, moves: Redistribution | None, comm: CpComm, purpose: str) -> Tensor:
    """Move rows back, the inverse of `redistribute`: [U, ...] -> [T, ...]."""
    if moves is None:
        return x
    return _Redistribute.apply(x, moves.back, moves.there, comm, purpose)


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, moves: TokenMoves, inverse: TokenMoves, comm: CpComm, purpose: str
    ) -> Tensor:
        # A permutation of rows over ranks: its gradient is the inverse permutation, without any sum.
        ctx.inverse, ctx.comm, ctx.purpose = inverse, comm, purpose
        return move_rows(x, moves, comm, purpose)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return move_rows(grad, ctx.inverse, ctx.comm, f"{ctx.purpose}_grad"), None, None, None, None

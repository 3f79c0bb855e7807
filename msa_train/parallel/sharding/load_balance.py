"""Share out queries, so that all ranks have equal work. Integers; no process group needed.

Late tokens see more than early ones, so with contiguous shards the last rank would have nearly twice the mean
of what is quadratic: block selection and full attention. Queries move, and their results come back; keys and
values stay. Block-sparse attention itself is alike for all queries and needs no balancing.

Work is counted per unit: a few neighbouring queries of one document. Every rank derives the same plan from
the documents of the pack: arrays of 32,768 units at 1M tokens, gone through once for every rank that gives,
about 4M comparisons at 256 ranks.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from msa_train.parallel.sharding.partition import SequencePartition, joined, zigzag_plan

Integers = npt.NDArray[np.int64]

# Tokens of a unit: fine enough for balance, coarse enough for long packs.
_UNIT_TOKENS = 32
# Largest work over mean work, in percent, from which on queries are moved.
_MOVE_ABOVE = 102
# The same up to which zigzag is good enough.
_ZIGZAG_UP_TO = 105


def unit_tokens(block_size: int) -> int:
    """Find the tokens of a unit: the largest power of two that divides a block, up to 32."""
    return math.gcd(block_size, _UNIT_TOKENS)


def index_work(cu_seqlens: Sequence[int], block_size: int) -> tuple[Integers, Integers]:
    """Count the block scores that queries need, padding included: [U] by unit, and each unit's document [U].

    Example: block_size 2, one document of 6 tokens -> [2, 4, 6]: two queries see 1, 2, 3 blocks.
    """
    unit, starts = unit_tokens(block_size), np.asarray(cu_seqlens, dtype=np.int64)
    position = np.arange(0, starts[-1], unit)
    document = np.searchsorted(starts, position, side="right") - 1
    return unit * (position // block_size - starts[document] // block_size + 1), document


def causal_work(
    cu_seqlens: Sequence[int], doc_lengths: Sequence[int], block_size: int
) -> tuple[Integers, Integers]:
    """Count the (query, key) pairs of full attention: [U] by unit, and each unit's document [U].

    Example: block_size 2, one document of 3 tokens in a slot of 6 -> [1 + 2, 3, 0].
    """
    unit, starts = unit_tokens(block_size), np.asarray(cu_seqlens, dtype=np.int64)
    position = np.arange(0, starts[-1], unit)
    document = np.searchsorted(starts, position, side="right") - 1
    before = position - starts[document]
    # Queries at n = before, before + 1, ... see n + 1 keys each: real * before + 1 + 2 + ... + real.
    real = np.clip(np.asarray(doc_lengths, dtype=np.int64)[document] - before, 0, unit)
    return real * before + real * (real + 1) // 2, document


def rank_work(plan: SequencePartition, work: Integers) -> list[int]:
    """Add up the work of each rank, for queries dealt in whole units.

    Example: units of one token with work 1 to 8, ranks [(0, 4)] and [(4, 8)] -> [10, 26].
    """
    unit = plan.seq_len // len(work)
    total = np.concatenate((np.zeros(1, dtype=np.int64), work.cumsum()))
    return [
        sum(int(total[stop // unit] - total[start // unit]) for start, stop in ranges)
        for ranges in plan.ranges
    ]


def is_balanced(loads: Sequence[int], percent: int = _MOVE_ABOVE) -> bool:
    """Tell whether the largest load is at most `percent` of the mean."""
    return 100 * max(loads) * len(loads) <= percent * sum(loads)


def balance(home: SequencePartition, work: Integers, document: Integers) -> SequencePartition:
    """Move queries from ranks with more work than the mean to those with less.

    A giver parts with the end of its costliest document part, then of the next one: few queries, in few
    ranges. Givers and takers line up, the largest surplus beside the largest deficit, and each taker gets
    a run of what is given. A query moves at most once.

    No rank ends up with more than the mean and one and a half of the costliest units. That is within 5% of
    the mean where sum(L^2) / max(L) >= 60 * unit * size over the document lengths L: for one document from
    60 units per rank on.

    Args:
        home: who holds which queries.
        work: [U] of each unit, see `index_work` and `causal_work`.
        document: [U] of each unit.

    Returns:
        The partition of queries to compute with, or `home` itself if that is balanced.

    Example: units of one token with work 1 to 8, ranks [(0, 4)] and [(4, 8)]: loads 10 and 26, mean 18. Rank
    1 gives its last unit, of work 8 -> ((0, 4), (7, 8)) and ((4, 7),), 18 each.
    """
    loads, size, unit = rank_work(home, work), home.size, home.seq_len // len(work)
    total = sum(loads)
    if is_balanced(loads):
        return home
    mean = total // size
    # Ties go by rank, so that every rank makes the same plan.
    givers = sorted((r for r in range(size) if loads[r] > mean), key=lambda r: (-loads[r], r))
    takers = sorted((r for r in range(size) if loads[r] < mean), key=lambda r: (loads[r], r))
    if not takers:
        return home
    owner = _owners(home, unit)
    given = _given(owner, work, document, [(r, loads[r] - mean) for r in givers])
    after = work[given].cumsum()
    if after.size == 0:
        return home
    edges = _edges([mean - loads[r] for r in takers], int(after[-1]))
    # A unit goes where its middle lies; doubled, to stay with integers.
    place = np.searchsorted(edges, 2 * after - work[given], side="right").clip(max=len(takers) - 1)
    owner[given] = np.asarray(takers, dtype=np.int64)[place]
    return _plan_of(owner, unit, size)


def balance_ring(
    home: SequencePartition, work: Integers, document: Integers
) -> tuple[SequencePartition, SequencePartition]:
    """Plan queries and keys for a ring: zigzag for both where that is balanced, as every step is then.

    Otherwise keys stay and queries move as in `balance`.

    Example: one document of 8 tokens, blocks of 2, 2 ranks -> ((0, 2), (6, 8)) and ((2, 6),) for both.
    """
    if is_balanced(rank_work(home, work)):
        return home, home
    if home.seq_len % (2 * home.size * (home.seq_len // len(work))) == 0:
        zigzag = zigzag_plan(home.seq_len, home.size)
        if is_balanced(rank_work(zigzag, work), _ZIGZAG_UP_TO):
            return zigzag, zigzag
    return balance(home, work, document), home


def cut_in_slices(plan: SequencePartition, work: Integers, num_slices: int) -> list[SequencePartition]:
    """Cut every rank's queries into slices of equal work, in the order of their positions.

    Args:
        plan: who computes which queries.
        work: [U] of each unit, see `index_work`.
        num_slices: of each rank; a slice may be empty where a rank has few units.

    Example: units of one token with work 1 to 8, ranks [(0, 4)] and [(4, 8)], 2 slices -> [(0, 3)] and [(4,
    6)], then [(3, 4)] and [(6, 8)].
    """
    unit, size = plan.seq_len // len(work), plan.size
    owner = _owners(plan, unit)
    number = np.zeros(len(work), dtype=np.int64)
    for rank in range(size):
        units = np.flatnonzero(owner == rank)
        # A unit goes where its middle lies; doubled, to stay with integers.
        after = 2 * work[units].cumsum() - work[units]
        total = 2 * int(work[units].sum())
        number[units] = np.minimum(after * num_slices // max(total, 1), num_slices - 1)
    ranges: list[list[list[tuple[int, int]]]] = [[[] for _ in range(size)] for _ in range(num_slices)]
    cuts = np.flatnonzero(np.diff(owner) | np.diff(number)) + 1
    for start, stop in pairwise([0, *cuts.tolist(), len(owner)]):
        ranges[int(number[start])][int(owner[start])].append((start * unit, stop * unit))
    return [SequencePartition(plan.seq_len, tuple(joined(parts) for parts in part)) for part in ranges]


def _owners(plan: SequencePartition, unit: int) -> Integers:
    """List the rank of each unit: ranges ((0, 2), (6, 8)) and ((2, 6),), units of 2 -> [0, 1, 1, 0]."""
    owner = np.empty(plan.seq_len // unit, dtype=np.int64)
    for rank, ranges in enumerate(plan.ranges):
        for start, stop in ranges:
            owner[start // unit : stop // unit] = rank
    return owner


def _given(owner: Integers, work: Integers, document: Integers, surpluses: list[tuple[int, int]]) -> Integers:
    """Pick units that ranks give away, for (rank, surplus); the next gives less where one gives too much.

    Example: 12 units of work 1 to 12 on 3 ranks, one document; (rank 2, surplus 16) -> [11]: unit 10 would
    come next, but its middle would be at 12 + 11 / 2, beyond 16.
    """
    given, carried = [np.zeros(0, dtype=np.int64)], 0
    costliest = np.zeros(int(document[-1]) + 1, dtype=np.int64)
    for rank, surplus in surpluses:
        units = np.flatnonzero((owner == rank) & (work > 0))
        costliest[document[units]] = 0
        np.maximum.at(costliest, document[units], work[units])
        # By document, the one with the costliest unit first; in it from its end on: the costliest queries,
        # in few ranges.
        units = units[np.lexsort((-units, document[units], -costliest[document[units]]))]
        after = work[units].cumsum()
        # Up to the unit whose middle lies within the surplus, so that rounding errors are at most half a
        # unit.
        taken = int(np.count_nonzero(2 * after - work[units] <= 2 * (surplus + carried)))
        given.append(units[:taken])
        carried += surplus - int(after[taken - 1] if taken else 0)
    return np.concatenate(given)


def _edges(deficits: list[int], given: int) -> Integers:
    """Find where each taker's share of the given work ends, doubled; Python's integers, for large products.

    Example: deficits [3, 1] and 8 given -> [12, 16]: the first takes up to 6.
    """
    total, edge, edges = sum(deficits), 0, []
    for deficit in deficits:
        edge += deficit
        edges.append(2 * given * edge // total)
    return np.asarray(edges, dtype=np.int64)


def _plan_of(owner: Integers, unit: int, size: int) -> SequencePartition:
    """Make a partition of units' ranks: [0, 1, 1, 0], units of 2 -> ((0, 2), (6, 8)) and ((2, 6),)."""
    cuts = np.flatnonzero(np.diff(owner)) + 1
    edges = [0, *cuts.tolist(), len(owner)]
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    for start, stop in pairwise(edges):
        ranges[int(owner[start])].append((start * unit, stop * unit))
    return SequencePartition(len(owner) * unit, tuple(joined(parts) for parts in ranges))

"""Make placements from training's own plans: ranks that hold blocks, ranks that compute queries."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msa_train.config import CpLayout
from msa_train.parallel.sharding.load_balance import (
    balance,
    balance_ring,
    causal_work,
    index_work,
    rank_work,
    unit_tokens,
)
from msa_train.parallel.sharding.partition import SequencePartition, make_partition, merge_ranks
from msa_train.simulate.inputs.placement import Placement

IntArray = NDArray[np.int64]
LAYOUTS = tuple(layout.value for layout in CpLayout)


def place(
    layout: str,
    *,
    seq_len: int,
    block_size: int,
    cp_size: int,
    cu_seqlens: Sequence[int] | None = None,
    head_size: int = 1,
) -> Placement:
    """Place the blocks of all ranks, or of the P' = cp_size / head_size Ulysses groups.

    Args:
        layout: one of LAYOUTS.
        seq_len: tokens of the pack.
        block_size: tokens per block.
        cp_size: ranks.
        cu_seqlens: block-aligned document starts, the last entry is seq_len; None: one document.
        head_size: u, innermost ranks that share their shards (Ulysses group).

    Example: 16 tokens in blocks of 2, 2 ranks: contiguous -> owner [0, 0, 0, 0, 1, 1, 1, 1], zigzag -> owner
    [0, 0, 1, 1, 1, 1, 0, 0] and order [[0, 1, 6, 7], [2, 3, 4, 5]].

    Raises:
        ValueError: if the shards are not whole blocks, or documents do not start on block boundaries.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout}: must be one of {', '.join(LAYOUTS)}")
    starts = _check_documents(seq_len, block_size, cu_seqlens)
    # training's own planner: what is simulated is what would run
    plan = make_partition(CpLayout(layout), cp_size, starts.tolist(), block_size)
    if head_size > 1:
        plan = merge_ranks(plan, head_size)
    owner = owners(plan, block_size)
    # a stable sort by owner lists each rank's blocks in ascending order, equally many of each
    order = np.argsort(owner, kind="stable").reshape(plan.size, -1)
    # every block of a document points at the document's first block; documents are whole blocks
    doc_start = np.repeat(starts[:-1] // block_size, np.diff(starts) // block_size)
    return Placement(seq_len, block_size, plan.size, owner, order, doc_start, plan, starts.tolist())


def owners(plan: SequencePartition, unit: int) -> IntArray:
    """Return [seq_len / unit] int64, the rank of every unit of so many tokens.

    Example: ranges ((0, 2), (6, 8)) and ((2, 6),), unit 2 -> [0, 1, 1, 0].
    """
    owner = np.empty(plan.seq_len // unit, dtype=np.int64)
    for rank, ranges in enumerate(plan.ranges):
        for start, stop in ranges:
            owner[start // unit : stop // unit] = rank
    return owner


@dataclass(slots=True)
class Share:
    """Hold who computes which queries."""

    unit: int
    "tokens of a unit of queries: the largest power of two that divides a block, up to 32"
    owner: IntArray
    "[U] int64, rank that computes each unit"
    work: IntArray
    "[P] int64, work of each rank in the unit of the function that made it"
    moved: IntArray
    "[P, P] int64, tokens whose queries go, by receiving and by holding rank; 0 on the diagonal"

    @property
    def balance(self) -> float:
        """Return the largest work over the mean work; 1: all ranks have the same."""
        return float(self.work.max() / self.work.mean())


def share_index(placement: Placement, *, balanced: bool) -> Share:
    """Share index scoring; work in (query, block) scores.

    Example: 16 tokens in blocks of 2, contiguous on 2 ranks: work [20, 52] as held; balanced, the last unit's
    2 queries go to rank 0 -> owner [0, 0, 0, 0, 1, 1, 1, 0], work [36, 36], moved [[0, 2], [0, 0]].
    """
    work, document = index_work(placement.cu_seqlens, placement.block_size)
    away = balance(placement.plan, work, document) if balanced else placement.plan
    return _share(placement, away, work)


def share_full(placement: Placement, *, balanced: bool, ring: bool) -> tuple[Share, IntArray]:
    """Share full attention; work in (query, key) pairs. Also return [U] the owner of the keys of every unit.

    Example: the 2 ranks of `share_index`: work [36, 100] as held, [67, 69] balanced with keys where they are,
    [68, 68] for a ring, where queries and keys go to the zigzag layout [0, 0, 1, 1, 1, 1, 0, 0].
    """
    lengths = np.diff(placement.cu_seqlens).tolist()
    work, document = causal_work(placement.cu_seqlens, lengths, placement.block_size)
    queries = keys = placement.plan
    if balanced and ring:
        queries, keys = balance_ring(placement.plan, work, document)
    elif balanced:
        queries = balance(placement.plan, work, document)
    return _share(placement, queries, work), owners(keys, unit_tokens(placement.block_size))


def _share(placement: Placement, away: SequencePartition, work: IntArray) -> Share:
    # work is given per unit, so its length tells the unit
    unit = placement.seq_len // len(work)
    home, owner = owners(placement.plan, unit), owners(away, unit)
    moved = moves(home, owner, placement.cp_size) * unit
    return Share(unit, owner, np.asarray(rank_work(away, work), dtype=np.int64), moved)


def moves(before: IntArray, after: IntArray, cp_size: int) -> IntArray:
    """Count [P, P] units that change ranks, by new and by old rank; 0 on the diagonal.

    Example: ranks [0, 0, 1, 1] become [0, 1, 1, 1] -> [[0, 0], [1, 0]].
    """
    # one histogram of the pair (new, old), written as one number
    counts = np.bincount(after * cp_size + before, minlength=cp_size * cp_size).reshape(cp_size, cp_size)
    np.fill_diagonal(counts, 0)
    return counts


def _check_documents(seq_len: int, block_size: int, cu_seqlens: Sequence[int] | None) -> IntArray:
    starts = np.asarray([0, seq_len] if cu_seqlens is None else cu_seqlens, dtype=np.int64)
    if starts.shape[0] < 2 or starts[0] != 0 or starts[-1] != seq_len or (np.diff(starts) <= 0).any():
        raise ValueError(f"cu_seqlens={_short(starts)}: must rise from 0 to seq_len={seq_len}")
    # the end of the pack is the plan's to check
    if (starts[:-1] % block_size).any():
        raise ValueError(
            f"cu_seqlens={_short(starts)}: documents must start on multiples of block_size={block_size}"
        )
    return starts


def _short(values: IntArray) -> str:
    text = ", ".join(map(str, values[:6].tolist()))
    return f"[{text}{', ...' if values.shape[0] > 6 else ''}]"

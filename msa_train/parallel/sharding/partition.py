"""Share out the positions of a pack over ranks, for every layout. Plain integers; no process group needed.

Contiguous shards keep the union of selected blocks small, for neighbouring queries select alike; what they
leave unbalanced is mended by moving queries (`load_balance`). Zigzag and dealt shards are balanced as they
are, and select more remote blocks.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from msa_train.config import CpLayout

# [start, stop) in the pack
Range = tuple[int, int]

# Tokens of a chunk of the dealt layout, and the fewest chunks that a rank should get of a short pack.
_DEALT_TOKENS = 1024
_DEALT_CHUNKS = 8


@dataclass(slots=True, frozen=True)
class SequencePartition:
    """Hold a partition of the positions of a pack. A rank's rows are its positions in ascending order.

    Example: 8 tokens, zigzag over 2 ranks -> ranges (((0, 2), (6, 8)), ((2, 6),)).
    """

    seq_len: int
    "tokens of the pack"
    ranges: tuple[tuple[Range, ...], ...]
    "[start, stop) by rank, ascending and never touching one another"

    @property
    def size(self) -> int:
        """Count the ranks."""
        return len(self.ranges)

    @property
    def is_contiguous(self) -> bool:
        """Tell whether rank after rank, row after row is the order of the pack."""
        position = 0
        for ranges in self.ranges:
            for start, stop in ranges:
                if start != position:
                    return False
                position = stop
        return True

    def num_tokens(self, rank: int) -> int:
        """Count the tokens that a rank holds."""
        return count(self.ranges[rank])


def make_partition(
    kind: CpLayout, size: int, cu_seqlens: Sequence[int], block_size: int
) -> SequencePartition:
    """Make the ranges of all ranks: whole blocks, as many tokens on every rank.

    Args:
        kind: see CpLayout.
        size: ranks.
        cu_seqlens: block-aligned document starts of the pack, with its length at the end.
        block_size: tokens of a block.

    Raises:
        ValueError: if the pack cannot be cut so.
    """
    seq_len = cu_seqlens[-1]
    parts = 2 * size if kind is CpLayout.zigzag else size
    if seq_len % (parts * block_size):
        raise ValueError(
            f"seq_len={seq_len}: must be a multiple of {parts * block_size}, blocks of {block_size} tokens "
            f"in {parts} equal parts (layout {kind.value}, {size} ranks)"
        )
    if kind is CpLayout.contiguous:
        return contiguous_plan(seq_len, size)
    if kind is CpLayout.zigzag:
        return zigzag_plan(seq_len, size)
    return _dealt_plan(seq_len, size, cu_seqlens, block_size)


def contiguous_plan(seq_len: int, size: int) -> SequencePartition:
    """Give rank r the r-th of `size` equal parts: 8 tokens, 2 ranks -> ((0, 4),) and ((4, 8),)."""
    length = seq_len // size
    return SequencePartition(seq_len, tuple(((r * length, (r + 1) * length),) for r in range(size)))


def zigzag_plan(seq_len: int, size: int) -> SequencePartition:
    """Give rank r chunks r and 2 * size - 1 - r of 2 * size equal ones: equal causal work for one document.

    Example: 8 tokens, 2 ranks -> ((0, 2), (6, 8)) and ((2, 6),).
    """
    length = seq_len // (2 * size)
    chunks = [(i * length, (i + 1) * length) for i in range(2 * size)]
    return SequencePartition(seq_len, tuple(joined((chunks[r], chunks[-1 - r])) for r in range(size)))


def _dealt_plan(seq_len: int, size: int, cu_seqlens: Sequence[int], block_size: int) -> SequencePartition:
    """Deal chunks, the costliest first, to the rank with the least causal work that may still take one.

    Example: documents [0, 2) and [2, 8), blocks of 2, 2 ranks: areas [3, 3, 7, 11]; chunk 3 to rank 0, 2 and
    0 to rank 1, 1 to rank 0 -> ((2, 4), (6, 8)) and ((0, 2), (4, 6)).

    Source: MagiAttention (github.com/SandAI-org/MagiAttention) deals equal chunks by a heap in this way.
    """
    length = _dealt_chunk(seq_len // (size * block_size), block_size) * block_size
    num_chunks = seq_len // length
    areas = _causal_areas(cu_seqlens, length, num_chunks)
    heap, dealt = [(0, rank) for rank in range(size)], [[] for _ in range(size)]
    # Late chunks of long documents cost most; dealt first, the small ones even out what they leave.
    for chunk in sorted(range(num_chunks), key=lambda i: (-areas[i], i)):
        area, rank = heapq.heappop(heap)
        dealt[rank].append(chunk)
        # A full rank does not return to the heap: ranks hold equally many tokens.
        if len(dealt[rank]) < num_chunks // size:
            heapq.heappush(heap, (area + areas[chunk], rank))
    return SequencePartition(
        seq_len, tuple(joined((i * length, (i + 1) * length) for i in sorted(chunks)) for chunks in dealt)
    )


def _dealt_chunk(rank_blocks: int, block_size: int) -> int:
    """Choose the blocks of a chunk: up to 1,024 tokens, fewer where a rank would get only a few chunks.

    Example: 64 blocks of 128 tokens per rank -> 8, eight chunks of 1,024 tokens; 4 blocks of 2 tokens -> 1.
    """
    most = max(1, min(_DEALT_TOKENS // block_size, rank_blocks // _DEALT_CHUNKS))
    return next(n for n in range(most, 0, -1) if rank_blocks % n == 0)


def _causal_areas(cu_seqlens: Sequence[int], length: int, num_chunks: int) -> list[int]:
    """Count the (query, key) pairs of each chunk's queries within their documents, padding included.

    Example: documents [0, 2) and [2, 8), chunks of 2 -> [3, 3, 7, 11].
    """
    areas = [0] * num_chunks
    for doc_start, doc_stop in pairwise(cu_seqlens):
        for chunk in range(doc_start // length, -(-doc_stop // length)):
            # Sum of 1 to n is n (n + 1) / 2: pairs of queries up to `last`, less those before `first`.
            first = max(doc_start, chunk * length) - doc_start
            last = min(doc_stop, (chunk + 1) * length) - doc_start
            areas[chunk] += (last * (last + 1) - first * (first + 1)) // 2
    return areas


def merge_ranks(plan: SequencePartition, group_size: int) -> SequencePartition:
    """Make every `group_size` neighbouring ranks one that holds what they held together.

    Example: zigzag of 16 tokens over 4 ranks, group_size 2 -> ((0, 4), (12, 16)) and ((4, 12),).

    Raises:
        ValueError: if they do not come out even.
    """
    if plan.size % group_size:
        raise ValueError(f"group_size={group_size}: must divide the {plan.size} ranks of the plan")
    groups = (plan.ranges[i : i + group_size] for i in range(0, plan.size, group_size))
    return SequencePartition(
        plan.seq_len, tuple(joined(sorted(r for ranges in group for r in ranges)) for group in groups)
    )


def joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Join ascending ranges where they touch or overlap: [(0, 2), (2, 5)] -> ((0, 5),)."""
    result: list[Range] = []
    for start, stop in ranges:
        if start >= stop:
            continue
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return tuple(result)


def count(ranges: Sequence[Range]) -> int:
    """Count the positions in ranges that do not overlap: [(0, 2), (6, 8)] -> 4."""
    return sum(stop - start for start, stop in ranges)


def common(first: Sequence[Range], second: Sequence[Range]) -> list[Range]:
    """Find the positions in both: [(0, 4), (6, 9)] and [(2, 7)] -> [(2, 4), (6, 7)]. Both ascending."""
    result, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, stop = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < stop:
            result.append((start, stop))
        # The range that ends first meets no other any more.
        if first[i][1] <= second[j][1]:
            i += 1
        else:
            j += 1
    return result


def without(first: Sequence[Range], second: Sequence[Range]) -> tuple[Range, ...]:
    """Find the positions of the first that are not in the second: [(0, 9)] and [(2, 4)] -> ((0, 2), (4, 9)).

    Both ascending.
    """
    result: list[Range] = []
    for start, stop in first:
        for taken_start, taken_stop in common([(start, stop)], second):
            result.append((start, taken_start))
            start = taken_stop
        result.append((start, stop))
    return joined(result)


def rows_in(part: Sequence[Range], whole: Sequence[Range]) -> list[Range]:
    """Find the row ranges of positions `part` among the rows of `whole`, which has them all. Both ascending.

    Example: part [(7, 8)] of whole [(0, 2), (6, 8)] -> [(3, 4)].
    """
    result: list[Range] = []
    row, i = 0, 0
    for start, stop in whole:
        while i < len(part) and part[i][1] <= stop:
            first, last = part[i]
            assert first >= start, f"positions {part[i]} are not among {whole}"
            result.append((row + first - start, row + last - start))
            i += 1
        row += stop - start
    assert i == len(part), f"positions {part[i:]} are not among {whole}"
    return result

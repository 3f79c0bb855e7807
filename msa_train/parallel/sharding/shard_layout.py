"""Answer which tokens of a pack a rank holds, as the layers ask for it. No process group needed.

Shapes: S tokens of the pack, T = S / P of them per rank, P ranks, NB blocks of the pack, NL = NB / P per
rank.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from msa_train.parallel.comm.to_device import to_device
from msa_train.parallel.sharding.partition import Range, SequencePartition, contiguous_plan


@dataclass(slots=True, frozen=True)
class ShardLayout:
    """Hold one rank's share of a pack: whole blocks, as many on every rank, in ascending order.

    Neighbouring queries select neighbouring blocks, so contiguous shards keep the share of remote blocks
    small.

    Raises:
        ValueError: the ranks cannot have equally many whole blocks.
    """

    seq_len: int
    "S, tokens of the pack"
    block_size: int
    "tokens of a block"
    cp_rank: int
    "this rank among those that share the pack"
    cp_size: int
    "P"
    split: InitVar[SequencePartition | None] = None
    "partition over the ranks; None: rank r holds tokens [r * T, (r + 1) * T)"
    plan: SequencePartition = field(init=False)
    "the partition, also where `split` is None"
    _blocks: dict[torch.device, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self, split: SequencePartition | None) -> None:
        if self.seq_len % (self.cp_size * self.block_size):
            raise ValueError(
                f"seq_len={self.seq_len}: must be a multiple of cp_size * block_size = "
                f"{self.cp_size} * {self.block_size}"
            )
        plan = contiguous_plan(self.seq_len, self.cp_size) if split is None else split
        assert plan.size == self.cp_size, "a plan has as many ranks as the group"
        # Equal shards: all-gathers and reduce-scatters take one size from every rank.
        for rank, ranges in enumerate(plan.ranges):
            assert plan.num_tokens(rank) == self.local_seq_len, "all ranks hold equally many tokens"
            assert not any(edge % self.block_size for part in ranges for edge in part), "blocks are whole"
        object.__setattr__(self, "plan", plan)

    @property
    def local_seq_len(self) -> int:
        """Count the tokens of each rank, T."""
        return self.seq_len // self.cp_size

    @property
    def ranges(self) -> tuple[Range, ...]:
        """List the positions of this rank."""
        return self.plan.ranges[self.cp_rank]

    @property
    def num_blocks(self) -> int:
        """Count the blocks of the whole pack, NB."""
        return self.seq_len // self.block_size

    @property
    def num_local_blocks(self) -> int:
        """Count the blocks of each rank, NL."""
        return self.num_blocks // self.cp_size

    def blocks(self, device: torch.device) -> Tensor:
        """List the ids of each rank's blocks in the order it holds them: [P, NL] int64; 64 KiB at 1M tokens.

        Example: 8 tokens in blocks of 2, zigzag over 2 ranks -> [[0, 3], [1, 2]].
        """
        if device not in self._blocks:
            edges = [
                torch.arange(start // self.block_size, stop // self.block_size)
                for ranges in self.plan.ranges
                for start, stop in ranges
            ]
            self._blocks[device] = to_device(torch.cat(edges).view(self.cp_size, -1), device)
        return self._blocks[device]

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "ShardLayout":
        """Keep what `change` makes of the block ids for the device that it brings them to."""
        # Block ids travel to the device with the rest of a plan, in its one copy.
        changed = change(self.blocks(torch.device("cpu")))
        self._blocks[changed.device] = changed
        return self

    def own_blocks(self, device: torch.device) -> Tensor:
        """List the ids of this rank's blocks, ascending: [NL] int64."""
        return self.blocks(device)[self.cp_rank]

    def blocks_by_owner(self, x: Tensor) -> Tensor:
        """Sort values of all blocks [M, NB] by rank -> [P, M, NL], in the order each rank holds its blocks.

        Example: zigzag over 2 ranks, [[10, 11, 12, 13]] -> [[[10, 13]], [[11, 12]]].
        """
        num_kv_heads = x.shape[0]
        # Contiguous shards are in rank order already: a view, no copy.
        if not self.plan.is_contiguous:
            x = x[:, self.blocks(x.device).flatten()]
        return x.view(num_kv_heads, self.cp_size, -1).transpose(0, 1)

    def in_order(self, x: Tensor) -> Tensor:
        """Put gathered rows of all ranks into the order of the pack: [P, T, ...] -> [S, ...].

        Example: 8 tokens in blocks of 2, zigzag over 2 ranks: [[a, b, g, h], [c, d, e, f]] -> [a, b, c, d, e,
        f, g, h].
        """
        flat = x.flatten(0, 1)
        if self.plan.is_contiguous:
            return flat
        return self._by_block(flat, self.blocks(x.device).flatten().argsort())

    def by_owner(self, x: Tensor) -> Tensor:
        """Sort rows by rank, the inverse of `in_order`, for a reduce-scatter: [S, ...] -> [P, T, ...]."""
        if not self.plan.is_contiguous:
            x = self._by_block(x, self.blocks(x.device).flatten())
        return x.view(self.cp_size, -1, *x.shape[1:])

    def _by_block(self, x: Tensor, order: Tensor) -> Tensor:
        return x.view(-1, self.block_size, *x.shape[1:])[order].flatten(0, 1)


@dataclass(slots=True, frozen=True)
class Segment:
    """Hold neighbouring queries of one document among the rows of a rank."""

    start: int
    "position of the first query in the pack"
    stop: int
    "position after the last query; real tokens only"
    doc_start: int
    "position where the document begins, on this or another rank"
    row: int
    "of the first query among the rank's tokens"

    def rows(self, first: int, last: int) -> slice:
        """Find the rows of positions [first, last): Segment(8, 12, 8, 4), 9 and 11 -> rows 5 and 6."""
        return slice(self.row + first - self.start, self.row + last - self.start)


def local_segments(
    cu_seqlens: Sequence[int], doc_lengths: Sequence[int], ranges: Sequence[Range]
) -> list[Segment]:
    """List the document parts among the positions of a rank, padding left out.

    Example: documents of 5 and 8 tokens in slots [0, 8) and [8, 16), ranges [(4, 12)] ->
    [Segment(4, 5, 0, 0), Segment(8, 12, 8, 4)].
    """
    segments, row = [], 0
    for start, stop in ranges:
        # The document in which the range begins; those after it follow.
        i = bisect_right(cu_seqlens, start) - 1
        while i < len(doc_lengths) and cu_seqlens[i] < stop:
            doc_start = cu_seqlens[i]
            first, last = max(doc_start, start), min(doc_start + doc_lengths[i], stop)
            if first < last:
                segments.append(Segment(first, last, doc_start, row + first - start))
            i += 1
        row += stop - start
    return segments


@dataclass(slots=True, frozen=True)
class VisiblePart:
    """Hold queries and keys of which every query sees every key, or, if causal, those up to its own."""

    rows: slice
    "of the queries among the rank's tokens"
    start: int
    "position of the first key"
    stop: int
    "position after the last key"
    causal: bool
    "queries and keys are the same tokens, and each query sees keys up to its own position"
    whole: bool
    "these are all rows of a segment"


def visible_parts(segment: Segment, start: int, stop: int) -> list[VisiblePart]:
    """Cut what the queries of a segment see of keys [start, stop): at most a square and two rectangles.

    Example: queries 4..8 of a document from 0 on, keys 2..6 -> keys 4, 5 causally by queries 4, 5; the same
    keys by queries 6, 7; keys 2, 3 by all queries.
    """
    # Later keys than the last query and other documents' are hidden from all. Of what is left, keys among the
    # segment's own positions are seen causally, those before by every query.
    start, stop = max(start, segment.doc_start), min(stop, segment.stop)
    parts = []
    first = max(start, segment.start)
    if first < stop:
        whole = (first, stop) == (segment.start, segment.stop)
        parts.append(VisiblePart(segment.rows(first, stop), first, stop, causal=True, whole=whole))
        if stop < segment.stop:
            later = segment.rows(stop, segment.stop)
            parts.append(VisiblePart(later, first, stop, causal=False, whole=False))
    stop = min(stop, segment.start)
    if start < stop:
        rows = segment.rows(segment.start, segment.stop)
        parts.append(VisiblePart(rows, start, stop, causal=False, whole=True))
    return parts

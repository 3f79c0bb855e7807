"""Which tokens of a pack a rank holds, and what it may see. Plain integers; no process group needed."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class ShardLayout:
    """Contiguous split of a pack: rank r holds tokens [r * T, (r + 1) * T), a whole number of blocks.

    Neighbouring queries select neighbouring blocks, so contiguous shards keep the share of remote blocks
    small.
    """

    seq_len: int
    block_size: int
    cp_rank: int
    cp_size: int

    def __post_init__(self) -> None:
        if self.seq_len % (self.cp_size * self.block_size):
            raise ValueError(
                f"seq_len={self.seq_len}: must be a multiple of cp_size * block_size = "
                f"{self.cp_size} * {self.block_size}"
            )

    @property
    def local_seq_len(self) -> int:
        """Tokens of each rank."""
        return self.seq_len // self.cp_size

    @property
    def start(self) -> int:
        """Position of this rank's first token."""
        return self.cp_rank * self.local_seq_len

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole pack."""
        return self.seq_len // self.block_size

    @property
    def num_local_blocks(self) -> int:
        """Blocks of each rank."""
        return self.num_blocks // self.cp_size

    @property
    def first_block(self) -> int:
        """Id of this rank's first block."""
        return self.cp_rank * self.num_local_blocks


@dataclass(slots=True, frozen=True)
class Segment:
    """The part of one document that lies on a rank.

    start, stop: positions in the pack, real tokens only; doc_start: where the document begins, on this or
    an earlier rank.
    """

    start: int
    stop: int
    doc_start: int


def local_segments(
    cu_seqlens: Sequence[int], doc_lengths: Sequence[int], start: int, stop: int
) -> list[Segment]:
    """Document parts among positions [start, stop), padding left out.

    Example: documents of 5 and 8 tokens in slots [0, 8) and [8, 16), positions [4, 12) ->
    [Segment(4, 5, 0), Segment(8, 12, 8)].
    """
    segments = []
    for doc_start, length in zip(cu_seqlens[:-1], doc_lengths, strict=True):
        first, last = max(doc_start, start), min(doc_start + length, stop)
        if first < last:
            segments.append(Segment(first, last, doc_start))
    return segments


def prefix_range(segments: Sequence[Segment], shard_start: int) -> tuple[int, int]:
    """Positions before the shard that its queries may see: (doc_start, shard_start), or an empty range.

    Only the shard's first document can have begun on an earlier rank.
    """
    if segments and segments[0].doc_start < shard_start:
        return segments[0].doc_start, shard_start
    return shard_start, shard_start


def prefix_splits(
    cu_seqlens: Sequence[int], doc_lengths: Sequence[int], seq_len: int, cp_rank: int, cp_size: int
) -> tuple[list[int], list[int]]:
    """Tokens that each rank sends to and receives from each other so that all hold their prefixes.

    Every rank needs a range that ends where its shard begins, so what a rank sends is always a suffix of
    its own shard.

    Example: one document of 12 tokens, cp_size 3, cp_rank 1 -> send [0, 0, 4], receive [4, 0, 0].

    Returns:
        send[r]: tokens at the end of this shard that rank r needs; receive[r]: tokens that this rank needs
        from the end of rank r's shard.
    """
    length = seq_len // cp_size
    ranges = []
    for rank in range(cp_size):
        start = rank * length
        segments = local_segments(cu_seqlens, doc_lengths, start, start + length)
        ranges.append(prefix_range(segments, start))

    def tokens(needing: int, owner: int) -> int:
        first, last = ranges[needing]
        return max(0, min(last, (owner + 1) * length) - max(first, owner * length))

    return (
        [tokens(rank, cp_rank) for rank in range(cp_size)],
        [tokens(cp_rank, rank) for rank in range(cp_size)],
    )

"""Shards, document segments and prefix exchange plans: integers, against brute force over single tokens."""

import numpy as np
import pytest

from msa_train.parallel.layout import (
    Segment,
    ShardLayout,
    local_segments,
    prefix_range,
    prefix_splits,
)

PACKS = {
    "one_long": ([0, 48], [48]),
    "one_long_padded": ([0, 48], [41]),
    "many_short": ([0, 4, 12, 16, 20, 48], [3, 8, 1, 4, 20]),
    "cut_by_borders": ([0, 20, 44, 48], [18, 24, 2]),
    "ends_in_padding": ([0, 8, 48], [8, 3]),
}


def tokens_of(cu_seqlens: list[int], doc_lengths: list[int]) -> np.ndarray:
    """Document of every position, -1 for padding."""
    document = np.full(cu_seqlens[-1], -1)
    for i, (start, length) in enumerate(zip(cu_seqlens[:-1], doc_lengths, strict=True)):
        document[start : start + length] = i
    return document


def test_documented_examples() -> None:
    assert local_segments([0, 8, 16], [5, 8], 4, 12) == [Segment(4, 5, 0), Segment(8, 12, 8)]
    assert prefix_splits([0, 12], [12], 12, 1, 3) == ([0, 0, 4], [4, 0, 0])
    layout = ShardLayout(seq_len=96, block_size=4, cp_rank=2, cp_size=3)
    assert (layout.local_seq_len, layout.start) == (32, 64)
    assert (layout.num_blocks, layout.num_local_blocks, layout.first_block) == (24, 8, 16)


def test_layout_needs_whole_blocks() -> None:
    with pytest.raises(ValueError, match="seq_len=40: must be a multiple of cp_size \\* block_size"):
        ShardLayout(seq_len=40, block_size=4, cp_rank=0, cp_size=3)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("pack", PACKS)
def test_segments_and_prefixes_by_brute_force(pack: str, cp_size: int) -> None:
    cu_seqlens, doc_lengths = PACKS[pack]
    document, length = tokens_of(cu_seqlens, doc_lengths), 48 // cp_size
    sends = np.zeros((cp_size, cp_size), dtype=int)
    receives = np.zeros((cp_size, cp_size), dtype=int)
    for rank in range(cp_size):
        start, stop = rank * length, (rank + 1) * length
        segments = local_segments(cu_seqlens, doc_lengths, start, stop)
        covered = [p for s in segments for p in range(s.start, s.stop)]
        assert covered == [p for p in range(start, stop) if document[p] >= 0]
        for segment in segments:
            assert len({document[p] for p in range(segment.start, segment.stop)}) == 1
        # What a rank must fetch: earlier tokens of the documents its queries belong to.
        local = {document[p] for p in covered}
        needed = [p for p in range(start) if document[p] in local]
        first, last = prefix_range(segments, start)
        assert list(range(first, last)) == needed
        sends[rank], receives[rank] = prefix_splits(cu_seqlens, doc_lengths, 48, rank, cp_size)
        by_owner = [sum(1 for p in needed if p // length == owner) for owner in range(cp_size)]
        assert receives[rank].tolist() == by_owner
    assert (sends == receives.T).all()

"""Shards, document segments and what queries see: integers, against brute force over single tokens."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from msa_train.config import CpLayout
from msa_train.parallel.sharding.partition import make_partition
from msa_train.parallel.sharding.shard_layout import (
    Segment,
    ShardLayout,
    VisiblePart,
    local_segments,
    visible_parts,
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
    assert local_segments([0, 8, 16], [5, 8], [(4, 12)]) == [Segment(4, 5, 0, 0), Segment(8, 12, 8, 4)]
    assert visible_parts(Segment(4, 8, 0, 0), 2, 6) == [
        VisiblePart(slice(0, 2), 4, 6, causal=True, whole=False),
        VisiblePart(slice(2, 4), 4, 6, causal=False, whole=False),
        VisiblePart(slice(0, 4), 2, 4, causal=False, whole=True),
    ]
    zigzag = make_partition(CpLayout.zigzag, 2, [0, 8], 2)
    layout = ShardLayout(seq_len=8, block_size=2, cp_rank=1, cp_size=2, split=zigzag)
    assert layout.blocks(torch.device("cpu")).tolist() == [[0, 3], [1, 2]]
    layout = ShardLayout(seq_len=96, block_size=4, cp_rank=2, cp_size=3)
    assert (layout.local_seq_len, layout.ranges) == (32, ((64, 96),))
    assert (layout.num_blocks, layout.num_local_blocks) == (24, 8)


def test_layout_needs_whole_blocks() -> None:
    with pytest.raises(ValueError, match="seq_len=40: must be a multiple of cp_size \\* block_size"):
        ShardLayout(seq_len=40, block_size=4, cp_rank=0, cp_size=3)


@pytest.mark.parametrize("kind", CpLayout)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 6])
@pytest.mark.parametrize("pack", PACKS)
def test_segments_see_their_past_once(pack: str, cp_size: int, kind: CpLayout) -> None:
    """Keys are cut at other places than queries, as on a ring; every visible pair comes exactly once."""
    cu_seqlens, doc_lengths = PACKS[pack]
    document, plan = tokens_of(cu_seqlens, doc_lengths), make_partition(kind, cp_size, cu_seqlens, 4)
    cuts = [0, 3, 4, 17, 24, 41, 48]
    seen = np.zeros((48, 48), dtype=int)
    for ranges in plan.ranges:
        positions = [p for start, stop in ranges for p in range(start, stop)]
        segments = local_segments(cu_seqlens, doc_lengths, ranges)
        covered = [p for s in segments for p in range(s.start, s.stop)]
        assert covered == [p for p in positions if document[p] >= 0]
        for segment in segments:
            assert positions[segment.row] == segment.start
            assert segment.doc_start == cu_seqlens[document[segment.start]]
            for start, stop in pairwise(cuts):
                for part in visible_parts(segment, start, stop):
                    assert start <= part.start < part.stop <= stop
                    rows = positions[part.rows]
                    assert part.whole == (rows == list(range(segment.start, segment.stop)))
                    for i, row in enumerate(rows):
                        last = part.start + i + 1 if part.causal else part.stop
                        seen[row, part.start : last] += 1
    position = np.arange(48)
    visible = (document[:, None] == document) & (document >= 0) & (position <= position[:, None])
    assert (seen == visible).all()


@pytest.mark.parametrize("kind", CpLayout)
@pytest.mark.parametrize("pack", PACKS)
def test_orders_are_inverse(pack: str, kind: CpLayout) -> None:
    cu_seqlens, _ = PACKS[pack]
    plan = make_partition(kind, 3, cu_seqlens, 4)
    layouts = [ShardLayout(seq_len=48, block_size=4, cp_rank=r, cp_size=3, split=plan) for r in range(3)]
    every = torch.arange(48)[:, None] * torch.tensor([1, 100])
    own = [torch.cat([every[start:stop] for start, stop in layout.ranges]) for layout in layouts]
    gathered = torch.stack(own)
    assert torch.equal(layouts[0].in_order(gathered), every)
    assert torch.equal(layouts[1].by_owner(every), gathered)
    blocks = layouts[0].blocks_by_owner(torch.arange(12).expand(2, -1))
    for rank, layout in enumerate(layouts):
        ids = layout.own_blocks(torch.device("cpu"))
        assert ids.tolist() == sorted({int(p) // 4 for p in own[rank][:, 0]})
        assert torch.equal(blocks[rank], ids.expand(2, -1))

"""Plans of sequences and of work, over many random packs: integers, no process group."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from msa_train.config import CpLayout
from msa_train.parallel.sharding.load_balance import (
    balance,
    balance_ring,
    causal_work,
    index_work,
    rank_work,
    unit_tokens,
)
from msa_train.parallel.sharding.partition import (
    Range,
    SequencePartition,
    common,
    contiguous_plan,
    count,
    joined,
    make_partition,
    merge_ranks,
    rows_in,
    without,
    zigzag_plan,
)
from msa_train.parallel.sharding.redistribute import make_moves, plan_redistribution


def ranges_of(
    rank: int,
    size: int,
    cu_seqlens: Sequence[int],
    *,
    kind: CpLayout = CpLayout.contiguous,
    block_size: int = 1,
) -> tuple[Range, ...]:
    """Positions of one rank."""
    return make_partition(kind, size, cu_seqlens, block_size).ranges[rank]


def random_pack(rng: np.random.Generator, num_blocks: int, block_size: int) -> tuple[list[int], list[int]]:
    """1 to 200 documents of very different lengths; the last one may end in much padding."""
    most = min(num_blocks, int(rng.choice([1, 2, 5, 20, 200])))
    num_docs = int(rng.integers(1, most + 1))
    share = rng.dirichlet(np.full(num_docs, float(rng.choice([0.3, 1.0, 20.0]))))
    blocks = 1 + rng.multinomial(num_blocks - num_docs, share)
    edges = [0, *(blocks.cumsum() * block_size).tolist()]
    lengths = (blocks * block_size - rng.integers(0, block_size, num_docs)).tolist()
    if rng.random() < 0.2:
        lengths[-1] = int(rng.integers(1, lengths[-1] + 1))
    return edges, lengths


def positions(parts: tuple[tuple[int, int], ...]) -> list[int]:
    return [p for start, stop in parts for p in range(start, stop)]


def assert_partition(split: SequencePartition) -> None:
    edges = sorted(part for ranges in split.ranges for part in ranges)
    assert edges[0][0] == 0
    assert edges[-1][1] == split.seq_len
    assert all(a[1] == b[0] for a, b in pairwise(edges))
    for ranges in split.ranges:
        assert all(a[1] < b[0] for a, b in pairwise(ranges)), "touching ranges"


def test_documented_examples() -> None:
    assert ranges_of(0, 2, [0, 8], kind=CpLayout.zigzag) == ((0, 2), (6, 8))
    assert ranges_of(1, 2, [0, 8], kind=CpLayout.zigzag) == ((2, 6),)
    assert joined([(0, 2), (2, 5)]) == ((0, 5),)
    assert common([(0, 4), (6, 9)], [(2, 7)]) == [(2, 4), (6, 7)]
    assert rows_in([(7, 8)], [(0, 2), (6, 8)]) == [(3, 4)]
    assert without([(0, 9), (12, 14)], [(2, 4), (8, 13)]) == ((0, 2), (4, 8), (13, 14))
    assert index_work([0, 6], 2)[0].tolist() == [2, 4, 6]
    assert causal_work([0, 6], [3], 2)[0].tolist() == [1 + 2, 3, 0]
    assert [unit_tokens(size) for size in (128, 16, 24, 3)] == [32, 16, 8, 1]


@pytest.mark.parametrize("kind", CpLayout)
def test_layouts_are_partitions_into_equal_whole_blocks(kind: CpLayout) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        size, block_size = int(rng.integers(1, 33)), int(rng.choice([1, 8, 128]))
        cu_seqlens, _ = random_pack(rng, 2 * size * int(rng.integers(1, 60)), block_size)
        split = make_partition(kind, size, cu_seqlens, block_size)
        assert_partition(split)
        assert {split.num_tokens(rank) for rank in range(size)} == {cu_seqlens[-1] // size}
        assert all(edge % block_size == 0 for parts in split.ranges for part in parts for edge in part)
        assert split == make_partition(kind, size, cu_seqlens, block_size)
        merged = merge_ranks(split, size)
        assert merged.ranges == (((0, cu_seqlens[-1]),),)
        if size % 2 == 0:
            halves = merge_ranks(split, 2)
            assert_partition(halves)
            assert positions(halves.ranges[0]) == sorted(
                positions(split.ranges[0]) + positions(split.ranges[1])
            )


def test_dealt_is_about_balanced_at_home() -> None:
    """Chunks of 1,024 tokens, eight and more per rank: one document and a pack of several."""
    for cu_seqlens in ([0, 2**20], [0, 2**18, 2**19, 2**19 + 2**17, 2**20]):
        split = make_partition(CpLayout.dealt, 16, cu_seqlens, 128)
        assert all((stop - start) % 1024 == 0 for parts in split.ranges for start, stop in parts)
        lengths = np.diff(cu_seqlens).tolist()
        work = rank_work(split, causal_work(cu_seqlens, lengths, 128)[0])
        assert max(work) * len(work) <= 1.05 * sum(work)
        assert max(rank_work(contiguous_plan(2**20, 16), causal_work(cu_seqlens, lengths, 128)[0])) > max(
            work
        )


def test_uneven_lengths_and_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_len=24: must be a multiple of 16"):
        make_partition(CpLayout.zigzag, 2, [0, 24], 4)
    with pytest.raises(ValueError, match="group_size=2: must divide the 3 ranks"):
        merge_ranks(contiguous_plan(12, 3), 2)


def test_work_by_brute_force() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        block_size = int(rng.choice([2, 4, 64]))
        cu_seqlens, lengths = random_pack(rng, 12, block_size)
        unit = unit_tokens(block_size)
        index, causal = np.zeros(cu_seqlens[-1], dtype=int), np.zeros(cu_seqlens[-1], dtype=int)
        for start, stop, length in zip(cu_seqlens[:-1], cu_seqlens[1:], lengths, strict=True):
            for p in range(start, stop):
                index[p] = p // block_size - start // block_size + 1
                causal[p] = p - start + 1 if p < start + length else 0
        assert index_work(cu_seqlens, block_size)[0].tolist() == index.reshape(-1, unit).sum(1).tolist()
        got = causal_work(cu_seqlens, lengths, block_size)[0]
        assert got.tolist() == causal.reshape(-1, unit).sum(1).tolist()


def test_largest_work_is_near_the_mean() -> None:
    """Documented bound always; 1.05 where units are small enough; over packs of 1 to 200 documents."""
    rng, within = np.random.default_rng(3), 0
    for _ in range(200):
        size = int(rng.choice([2, 3, 4, 8, 16, 64]))
        cu_seqlens, lengths = random_pack(rng, size * int(rng.integers(8, 200)), 128)
        kind = CpLayout(rng.choice(["contiguous", "contiguous", "zigzag", "dealt"]))
        if (cu_seqlens[-1] // 128) % (2 * size):
            kind = CpLayout.contiguous
        home = make_partition(kind, size, cu_seqlens, 128)
        for work, document in (index_work(cu_seqlens, 128), causal_work(cu_seqlens, lengths, 128)):
            away, loads = balance(home, work, document), rank_work(home, work)
            assert_partition(away)
            moved = rank_work(away, work)
            assert sum(moved) == sum(loads) == work.sum()
            mean, unit = sum(loads) / size, int(work.max())
            assert max(moved) <= max(1.02 * mean, mean + 1.5 * unit + 2)
            enough = 1.5 * unit <= 0.05 * mean
            within += enough
            if enough:
                assert max(moved) <= 1.05 * mean
            # Givers only give and takers only take: no query moves twice.
            for rank, (before, after) in enumerate(zip(home.ranges, away.ranges, strict=True)):
                kept = count(common(before, after))
                assert kept in (count(before), count(after)), f"rank {rank} both gives and takes"
    assert within > 200


def test_one_long_document_needs_few_moves() -> None:
    """1M tokens over 64 ranks: mirror ranks share, in two ranges at most each; under a quarter moves."""
    work, document = index_work([0, 2**20], 128)
    home = contiguous_plan(2**20, 64)
    away = balance(home, work, document)
    loads = rank_work(away, work)
    assert max(loads) * 64 <= 1.005 * sum(loads)
    assert max(rank_work(home, work)) * 64 > 1.9 * sum(loads)
    assert max(len(ranges) for ranges in away.ranges) <= 4
    kept = sum(count(common(a, b)) for a, b in zip(home.ranges, away.ranges, strict=True))
    assert kept > 0.75 * 2**20


def test_ring_takes_zigzag_where_it_is_balanced() -> None:
    home = contiguous_plan(4096, 4)
    zigzag = zigzag_plan(4096, 4)
    assert balance_ring(home, *causal_work([0, 4096], [4096], 128)) == (zigzag, zigzag)
    assert balance_ring(zigzag, *causal_work([0, 4096], [4096], 128)) == (zigzag, zigzag)
    # Half of it is padding, so zigzag's late chunks have no work.
    work, document = causal_work([0, 4096], [2048], 128)
    queries, keys = balance_ring(home, work, document)
    assert keys == home
    assert queries == balance(home, work, document) != home


def test_moves_match_between_ranks() -> None:
    """What one rank sends to another is what that one expects, row by row, in all three uses."""
    rng = np.random.default_rng(4)
    for _ in range(30):
        size = int(rng.integers(2, 6))
        cu_seqlens, lengths = random_pack(rng, 2 * size * 6, 8)
        home = make_partition(CpLayout(rng.choice(list(CpLayout)).value), size, cu_seqlens, 8)
        away = balance(home, *causal_work(cu_seqlens, lengths, 8))
        # Every rank wants the start of the pack, so its owner sends to several.
        wanted = tuple(joined(sorted([(0, 16), *parts])) for parts in away.ranges)
        for after in (away.ranges, wanted):
            all_moves = [make_moves(home.ranges, after, rank) for rank in range(size)]
            for rank, moves in enumerate(all_moves):
                mine = torch.tensor(positions(home.ranges[rank]))
                result = torch.full((moves.num_after,), -1)
                result[moves.kept[1]] = mine[moves.kept[0]]
                arrived = [
                    torch.tensor(positions(home.ranges[peer]))[other.sent.split(other.send)[rank]]
                    for peer, other in enumerate(all_moves)
                ]
                assert [len(rows) for rows in arrived] == moves.receive
                result[moves.received] = torch.cat(arrived)
                assert result.tolist() == positions(after[rank])
        assert (plan_redistribution(home, away, 0) is None) == (home.ranges == away.ranges)

"""Which queries are sampled, and the names under which their sums are reported."""

import pytest
import torch

from msa_train.config import CpLayout
from msa_train.parallel.attention.selection_recall import (
    RecallQueries,
    RecallSums,
    num_buckets,
    sample_queries,
)
from msa_train.parallel.sharding.partition import make_partition
from msa_train.parallel.sharding.shard_layout import ShardLayout
from msa_train.training.metrics.selection_recall import attention_metrics

CU_SEQLENS, DOC_LENGTHS = [0, 32, 40, 96], [29, 5, 50]
# topk 3 of blocks of 4: a query needs 12 tokens in the blocks before its own.
ELIGIBLE = [*range(12, 29), *range(52, 90)]


def sample(
    count: int, *, cp_rank: int = 0, cp_size: int = 1, seed: int = 1, kind: CpLayout = CpLayout.contiguous
) -> RecallQueries:
    plan = make_partition(kind, cp_size, CU_SEQLENS, 4)
    layout = ShardLayout(seq_len=96, block_size=4, cp_rank=cp_rank, cp_size=cp_size, split=plan)
    queries = sample_queries(CU_SEQLENS, DOC_LENGTHS, layout, topk=3, count=count, seed=seed)
    assert queries is not None
    return queries


def test_all_eligible_queries_where_they_are_few() -> None:
    for count in (len(ELIGIBLE), 1000):
        queries = sample(count)
        assert queries.position.tolist() == ELIGIBLE
        assert queries.doc_start.tolist() == [0] * 17 + [40] * 38


@pytest.mark.parametrize("count", [1, 5, 20])
def test_distinct_spread_and_repeatable(count: int) -> None:
    position = sample(count).position.tolist()
    assert len(set(position)) == count
    assert position == sorted(position)
    assert set(position) <= set(ELIGIBLE)
    assert position == sample(count).position.tolist()
    ranks = [ELIGIBLE.index(p) * count // len(ELIGIBLE) for p in position]
    assert all(abs(rank - i) <= 1 for i, rank in enumerate(ranks))
    assert any(position != sample(count, seed=seed).position.tolist() for seed in range(2, 6))


@pytest.mark.parametrize("kind", CpLayout)
@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_ranks_share_one_sample(cp_size: int, kind: CpLayout) -> None:
    whole = sample(20)
    found: list[int] = []
    for rank in range(cp_size):
        part = sample(20, cp_rank=rank, cp_size=cp_size, kind=kind)
        assert torch.equal(part.position, whole.position)
        assert part.counts[rank] == part.rows.numel()
        assert ((part.rows >= 0) & (part.rows < 96 // cp_size)).all()
        positions = torch.cat([torch.arange(*edges) for edges in part.layout.ranges])
        assert torch.equal(part.position[part.own], positions[part.rows])
        found += part.position[part.own].tolist()
    assert sorted(found) == whole.position.tolist()
    if kind is CpLayout.contiguous:
        assert found == whole.position.tolist()


def test_no_query_sees_more_blocks_than_are_selected() -> None:
    layout = ShardLayout(seq_len=96, block_size=4, cp_rank=0, cp_size=1)
    none = sample_queries(CU_SEQLENS, DOC_LENGTHS, layout, topk=13, count=9, seed=1)
    assert none is None


def test_buckets() -> None:
    """Distances 0, 1, 2-3, 4-7, ...: the largest distance of a pack is its number of blocks less one."""
    assert [num_buckets(blocks) for blocks in (1, 2, 3, 4, 5, 8, 9, 24)] == [1, 2, 3, 3, 4, 4, 5, 6]


def test_metrics_of_sums() -> None:
    """Two layers of two groups, three buckets; the second bucket of the second layer is empty."""
    flat = torch.tensor(
        [
            [
                [4, 2, 8, *[4, 2, 2], *[4, 0, 1], *[2, 1, 0.5], *[2, 0, 0.25]],
                [4, 1, 4, *[4, 2, 2], *[4, 2, 2], *[2, 1, 0.5], *[2, 1, 0.5]],
            ],
            [
                [4, 4, 2, *[4, 0, 4], *[4, 0, 4], *[2, 0, 2], *[2, 0, 2]],
                [4, 0, 2, *[4, 0, 4], *[0, 0, 0], *[2, 0, 1], *[0, 0, 0]],
            ],
        ],
        dtype=torch.float64,
    )
    values = attention_metrics(flat, [2, 5])
    assert values["block_recall_by_layer"] == {"layer02": [5 / 8, 1.0], "layer05": [1.0, 0.0]}
    assert values["block_recall"] == pytest.approx((5 / 8 + 2) / 4)
    assert values["score_recall_by_layer"] == {"layer02": [0.5, 0.25], "layer05": [1.0, 0.0]}
    assert values["score_recall"] == pytest.approx(1.75 / 4)
    assert values["score_recall_best_by_layer"] == {"layer02": [0.875, 0.875], "layer05": [1.0, 0.75]}
    assert values["attention_entropy_by_layer"] == {"layer02": [2.0, 1.0], "layer05": [0.5, 0.5]}
    assert values["attention_entropy"] == 1.0
    assert values["block_recall_by_distance"] == {
        "layer02": {"distance0": 1.0, "distance1": 0.5, "distance2": 0.75},
        "layer05": {"distance0": 0.5, "distance1": None, "distance2": 0.5},
    }
    assert values["score_recall_by_distance"] == {
        "layer02": {"distance0": 1.0, "distance1": 0.5, "distance2": 0.75},
        "layer05": {"distance0": 0.5, "distance1": None, "distance2": 2 / 3},
    }
    assert attention_metrics(torch.zeros_like(flat), [2, 5]) == {}


def test_sums_round_trip() -> None:
    flat = torch.rand(3, 2, RecallSums.width(24), dtype=torch.float64)
    sums = RecallSums.from_flat(flat[0])
    assert sums.best_mass.shape == (2, 6)
    assert torch.equal(sums.flat(), flat[0])
    assert torch.equal(RecallSums.from_flat(flat).score, flat[..., 1])

"""Recall and entropy of sampled queries: a plain dense definition in fp64, the same on 1 to 4 ranks."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from msa_kernels import select_blocks
from torch import Tensor

from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import CpLayout, EngineKind, Precision
from msa_train.parallel.attention import selection_recall as attention_probe
from msa_train.parallel.attention.selection_recall import (
    RecallSums,
    measure_recall,
    num_buckets,
    sample_queries,
)
from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.process_groups import build_groups
from msa_train.parallel.sharding.partition import make_partition
from msa_train.parallel.sharding.shard_layout import ShardLayout
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.trainer import Trainer
from msa_train.training.worker import load_data
from tests.helpers.compare import assert_rows_close
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.resume_runs import Case, Layout, resume_config
from tests.helpers.spawn import run_ranks
from tests.helpers.training_command import write_corpus

S, BLOCK_SIZE, TOPK, M, G, D = 192, 4, 3, 2, 3, 8
SCALE = 0.9
# Document starts, real lengths: a long one over several ranks; a short one; one cut short by padding.
CU_SEQLENS, DOC_LENGTHS = [0, 104, 116, 192], [101, 12, 70]


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q [S, M, G, D], k [S, M, D] and a selection [S, M, TOPK]."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(S, M, G, D, generator=generator, dtype=torch.float64)
    k = torch.randn(S, M, D, generator=generator, dtype=torch.float64)
    q_index = torch.randn(S, M, 5, generator=generator)
    k_index = torch.randn(S, 5, generator=generator)
    selected = select_blocks(q_index, k_index, torch.tensor(CU_SEQLENS), block_size=BLOCK_SIZE, topk=TOPK)
    return q.to(dtype), k.to(dtype), selected


@cache
def reference(positions: tuple[int, ...]) -> RecallSums:
    """One query, group and block at a time; kept, for tests come back to the same queries."""
    q, k, selected = tensors()
    buckets = num_buckets(S // BLOCK_SIZE)
    sums = RecallSums.from_flat(torch.zeros(M, 3 + 4 * buckets, dtype=torch.float64))
    for i in positions:
        start = max(s for s in CU_SEQLENS[:-1] if s <= i)
        for m in range(M):
            p = torch.softmax(SCALE * (q[i, m] @ k[start : i + 1, m].T), dim=-1)
            mass = {
                block: float(p[:, max(0, block * BLOCK_SIZE - start) :][:, :BLOCK_SIZE].sum() / G)
                for block in range(start // BLOCK_SIZE, i // BLOCK_SIZE + 1)
            }
            best = sorted(mass, key=lambda block: -mass[block])[:TOPK]
            chosen = [block for block in selected[i, m].tolist() if block >= 0]
            sums.count[m] += 1
            sums.score[m] += sum(mass[block] for block in chosen)
            sums.entropy[m] += float(-(p * p.log()).sum() / G)
            for block in best:
                distance = i // BLOCK_SIZE - block
                bucket = 0 if distance == 0 else 1 + int(math.log2(distance))
                hit = block in chosen
                sums.best_count[m, bucket] += 1
                sums.hit_count[m, bucket] += hit
                sums.best_mass[m, bucket] += mass[block]
                sums.hit_mass[m, bucket] += hit * mass[block]
    return sums


# By number of ranks; the sums do not depend on it.
LAYOUTS = {1: CpLayout.contiguous, 2: CpLayout.dealt, 3: CpLayout.contiguous, 4: CpLayout.zigzag}


def probe(
    cp_rank: int, cp_size: int, comm: CpComm, count: int, dtype: torch.dtype
) -> tuple[list[int], Tensor]:
    """Positions of this rank's sampled queries and the sums over all ranks."""
    plan = make_partition(LAYOUTS[cp_size], cp_size, CU_SEQLENS, BLOCK_SIZE)
    layout = ShardLayout(seq_len=S, block_size=BLOCK_SIZE, cp_rank=cp_rank, cp_size=cp_size, split=plan)
    queries = sample_queries(CU_SEQLENS, DOC_LENGTHS, layout, topk=TOPK, count=count, seed=5)
    assert queries is not None
    q, k, selected = tensors(dtype)
    own = torch.cat([torch.arange(*edges) for edges in layout.ranges])
    positions = own[queries.rows].tolist()
    assert positions == queries.position[queries.own].tolist()
    sums = measure_recall(
        q[positions], k[own], selected[positions], queries, comm, softmax_scale=SCALE
    ).flat()
    if comm.group is not None:
        dist.all_reduce(sums, group=comm.group)
    return positions, sums


def worker(rank: int, world_size: int) -> dict[tuple[int, int], tuple[list[int], Tensor]]:
    """By cp_size and count: what this rank found."""
    # Several tiles per rank.
    attention_probe._CPU_TILE = 2000
    found = {}
    for cp_size in (2, 3, 4):
        group = dist.new_group(list(range(cp_size)))
        if rank < cp_size:
            comm = CpComm(group=group, rank=rank, size=cp_size)
            for count in (2, 50):
                found[cp_size, count] = probe(rank, cp_size, comm, count, torch.float64)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[int, int], tuple[list[int], Tensor]]]:
    return run_ranks(4, worker)


def alone(count: int, dtype: torch.dtype = torch.float64) -> tuple[list[int], Tensor]:
    return probe(0, 1, CpComm(group=None, rank=0, size=1), count, dtype)


@pytest.mark.parametrize("count", [1, 7, 50, 1000])
@pytest.mark.parametrize("tile", [2**21, 1000])
def test_equals_the_definition(count: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_probe, "_CPU_TILE", tile)
    positions, sums = alone(count)
    want = reference(tuple(positions))
    # The comparison says something: some top blocks were selected, some were not, near and far.
    if count >= 50:
        assert 0.1 < float(want.hit_count.sum() / want.best_count.sum()) < 0.9
        assert (want.best_count.sum(0)[:5] > 0).all()
    assert_rows_close(sums, want.flat(), 1e-12)
    got = RecallSums.from_flat(sums)
    assert torch.equal(got.best_count, want.best_count)
    assert torch.equal(got.hit_count, want.hit_count)
    assert (got.count == len(positions)).all()
    assert_rows_close(got.best_count.sum(1), TOPK * got.count, 1e-14)


@pytest.mark.parametrize("count", [2, 50])
@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_does_not_depend_on_the_number_of_ranks(
    cp_size: int, count: int, ranks: list[dict[tuple[int, int], tuple[list[int], Tensor]]]
) -> None:
    want_positions, want = alone(count)
    found = [ranks[rank][cp_size, count] for rank in range(cp_size)]
    assert sorted(position for positions, _ in found for position in positions) == want_positions
    for _, sums in found:
        assert_rows_close(sums, want, 1e-12)
        assert torch.equal(RecallSums.from_flat(sums).hit_count, RecallSums.from_flat(want).hit_count)


def recalls(rank: int, world_size: int, folder: str) -> dict[str, float]:
    """Of two steps of a run with every rank a replica."""
    layout = Layout(engine=EngineKind.torch, world_size=world_size, precision=Precision.fp64)
    config = resume_config(layout, Path(folder), Case(layout=layout))
    config.train.steps, config.logging.attention_every, config.logging.attention_queries = 2, 2, 6
    groups = build_groups(config.parallel, device=torch.device("cpu"), exchange=config.exchange)
    store = CheckpointStore(f"{folder}/run{world_size}")
    trainer = Trainer(config, groups, TorchEngine(config, groups), load_data(config), store, None)
    values = trainer.run(0)
    leave_groups()
    return {key: values[key] for key in ("block_recall", "score_recall", "attention_entropy", "lm_loss")}


def test_does_not_depend_on_the_number_of_replicas(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    (want,) = run_ranks(1, recalls, str(tmp_path))
    for found in run_ranks(2, recalls, str(tmp_path)):
        assert found == pytest.approx(want, rel=1e-10)
    assert 0 < want["block_recall"] < 1


def test_low_precision_inputs_are_summed_in_fp32() -> None:
    got, want = (RecallSums.from_flat(alone(50, dtype)[1]) for dtype in (torch.bfloat16, torch.float64))
    assert_rows_close(got.score, want.score, 2e-2)
    assert_rows_close(got.entropy, want.entropy, 2e-2)
    exact = RecallSums.from_flat(alone(50, torch.float32)[1])
    assert_rows_close(exact.entropy, want.entropy, 1e-5)


def test_everything_selected_is_full_recall() -> None:
    """All mass on one old block that is selected: recall 1, and the entropy of a block of equal scores."""
    layout = ShardLayout(seq_len=S, block_size=BLOCK_SIZE, cp_rank=0, cp_size=1)
    queries = sample_queries([0, S], [S], layout, topk=1, count=20, seed=0)
    assert queries is not None
    q, k = torch.ones(20, M, G, D, dtype=torch.float64), torch.zeros(S, M, D, dtype=torch.float64)
    k[:BLOCK_SIZE] = 100.0
    selected = torch.zeros(20, M, 1, dtype=torch.int32)
    comm = CpComm(group=None, rank=0, size=1)
    sums = measure_recall(q, k, selected, queries, comm, softmax_scale=1.0)
    assert_rows_close(sums.score, sums.count, 1e-12)
    assert torch.equal(sums.hit_count, sums.best_count)
    assert_rows_close(sums.entropy, sums.count * math.log(BLOCK_SIZE), 1e-12)

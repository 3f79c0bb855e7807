"""Recordings of a training step: what all ranks write together says what each of them selected."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from msa_train.config import AttentionConfig, CpLayout, ModelConfig, RunConfig
from msa_train.parallel.kv_exchange.requests import needed_kv_blocks
from msa_train.parallel.process_groups import Groups
from msa_train.parallel.sharding.partition import make_partition
from msa_train.parallel.sharding.shard_layout import ShardLayout
from msa_train.simulate.inputs.layouts import place
from msa_train.simulate.selections.recorded import read_selections
from msa_train.training.metrics.selection_recording import SelectionLog, chunk_tokens
from tests.helpers.packs import make_pack

SEQ_LEN, BLOCK_SIZE, P, M, TOPK = 96, 4, 3, 2, 3
GROUPS = cast(Groups, SimpleNamespace(dp_rank=0, pp_size=1, pp_rank=0))


def shard(layout: CpLayout, rank: int) -> ShardLayout:
    plan = make_partition(layout, P, [0, 40, SEQ_LEN], BLOCK_SIZE)
    return ShardLayout(SEQ_LEN, BLOCK_SIZE, rank, P, plan)


@pytest.mark.parametrize("layout", CpLayout)
def test_ranks_write_one_recording(layout: CpLayout, tmp_path: Path) -> None:
    config = RunConfig(
        run_dir=str(tmp_path),
        model=ModelConfig(num_kv_heads=M),
        attention=AttentionConfig(block_size=BLOCK_SIZE, topk=TOPK),
    )
    pack = make_pack([40, 56], seq_len=SEQ_LEN, block_size=BLOCK_SIZE, vocab_size=8, seed=0)
    selected = []
    for rank in range(P):
        log, here = SelectionLog(config, GROUPS, step=7), shard(layout, rank)
        on_selection = log.open(pack, here)
        assert on_selection is not None
        assert log.open(pack, here) is None, "the first pack only"
        generator = torch.Generator().manual_seed(rank)
        drawn = torch.randint(-1, SEQ_LEN // BLOCK_SIZE, (SEQ_LEN // P, M, TOPK), generator=generator)
        on_selection(2, drawn)
        log.save()
        selected.append(drawn)
    (recorded,) = read_selections(tmp_path / "selections" / "step_00000007")
    assert (recorded.layer, recorded.cu_seqlens) == (2, pack.cu_seqlens.tolist())
    assert recorded.sample_blocks.shape == (SEQ_LEN, M, TOPK)
    placement = place(
        layout.value, seq_len=SEQ_LEN, block_size=BLOCK_SIZE, cp_size=P, cu_seqlens=recorded.cu_seqlens
    )
    for rank in range(P):
        needed = needed_kv_blocks(selected[rank], SEQ_LEN // BLOCK_SIZE)
        assert torch.equal(torch.from_numpy(recorded.needed(placement, rank)), needed)


def test_only_the_first_replica_writes() -> None:
    other = cast(Groups, SimpleNamespace(dp_rank=1, pp_size=1, pp_rank=0))
    pack = make_pack([96], seq_len=SEQ_LEN, block_size=BLOCK_SIZE, vocab_size=8, seed=0)
    assert SelectionLog(RunConfig(), other, step=1).open(pack, shard(CpLayout.contiguous, 0)) is None


def test_chunks_of_a_long_pack() -> None:
    assert chunk_tokens(ShardLayout(2**20, 128, 0, 64)) == 1024
    # Shards of 3 blocks: chunks must not cross them.
    assert chunk_tokens(ShardLayout(3 * 2048 * 128, 128, 0, 2048)) == 3 * 128

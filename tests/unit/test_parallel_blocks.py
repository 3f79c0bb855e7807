"""Block needs and pool look-ups."""

import torch
from msa_kernels.block_sparse_attention.types import BlockPool

from msa_train.config import ExchangeConfig, KvExchange
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.kv_exchange.cost_model import KvBlockBytes
from msa_train.parallel.kv_exchange.requests import (
    ExchangeTerms,
    exchange_requests,
    kv_blocks_by_owner,
    needed_kv_blocks,
)
from msa_train.parallel.kv_exchange.session import KvSource
from msa_train.parallel.sharding.shard_layout import ShardLayout


def test_needed_pairs_is_the_union_per_group() -> None:
    block_indices = torch.tensor([[[0, 2, -1], [1, -1, -1]], [[2, 3, -1], [-1, -1, -1]]])
    needed = needed_kv_blocks(block_indices, 5)
    assert needed.tolist() == [[True, False, True, True, False], [False, True, False, False, False]]


def test_nothing_selected() -> None:
    assert not needed_kv_blocks(torch.full((3, 2, 4), -1), 5).any()


def test_entries_of_the_docstring() -> None:
    pool = BlockPool(kv=torch.zeros(8, 2, 1, 1), block=torch.zeros(8, dtype=torch.int64))
    source = KvSource(pool=pool, physical_block=torch.tensor([[4, -1, 7]]))
    assert source.block_table(torch.tensor([[[2, 1, -1]]])).tolist() == [[[7, -1, -1]]]


def test_pairs_by_owner_leave_out_own_ones() -> None:
    layout = ShardLayout(seq_len=8, block_size=2, cp_rank=1, cp_size=2)
    needed = torch.tensor([[True, False, True, True], [False, True, False, True]])
    assert kv_blocks_by_owner(needed, layout).tolist() == [[True, False, False, True], [False] * 4]


def test_one_rank_asks_nobody() -> None:
    layout = ShardLayout(seq_len=8, block_size=2, cp_rank=0, cp_size=1)
    terms = ExchangeTerms(
        KvExchange.selected, ExchangeConfig(), KvBlockBytes(1, 1, 1), (None, torch.zeros(1))
    )
    requests = exchange_requests(torch.ones(2, 4, dtype=torch.bool), layout, KvComm(None, 0, 1), terms)
    assert requests.plan is not None
    assert requests.plan.hops[0].send == requests.plan.hops[0].receive == [0]
    assert requests.plan.num_rows == requests.plan.num_hot == 0

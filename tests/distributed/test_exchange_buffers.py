"""What a layer keeps between forward and backward: fetched pairs only where they are to be kept."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from msa_train.config import ExchangeConfig, KvExchange
from msa_train.parallel.attention.cp_full import FullAttentionArgs, cp_full_attention
from msa_train.parallel.attention.cp_sparse import SparseAttentionArgs, cp_sparse_attention
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.comm.topology import build_comm
from msa_train.parallel.kv_exchange.full_plan import make_full_plan
from msa_train.parallel.kv_exchange.requests import kv_blocks_by_owner, needed_kv_blocks
from msa_train.parallel.sharding.shard_layout import ShardLayout
from tests.helpers.spawn import run_ranks

M, G, D, BLOCK_SIZE, NL = 2, 2, 4, 2, 6
PAIR_BYTES = 2 * BLOCK_SIZE * D * 8


def kept_storages(comm: KvComm, settings: ExchangeConfig, recompute: bool) -> tuple[list[int], int, Tensor]:
    """Bytes of every storage that autograd keeps after a forward, pairs fetched, and the gradient of k."""
    layout = ShardLayout(
        seq_len=comm.size * NL * BLOCK_SIZE, block_size=BLOCK_SIZE, cp_rank=comm.rank, cp_size=comm.size
    )
    generator, T = torch.Generator().manual_seed(comm.rank), layout.local_seq_len
    shapes = ((M, G, D), (M, D), (M, D))
    tensors = [torch.randn(T, *s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    own = torch.arange(T) // BLOCK_SIZE + comm.rank * NL
    # Rank 1 wants four of rank 0's blocks.
    others = torch.stack([torch.where(own < NL, -1, own % 4), own], 1)
    call = SparseAttentionArgs(
        block_indices=others[:, None].expand(-1, M, -1),
        position=torch.arange(T) + layout.ranges[0][0],
        layout=layout,
        comm=comm,
        exchange=KvExchange.selected,
        softmax_scale=1.0,
        settings=settings,
    )
    kept: dict[int, int] = {}

    def remember(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def layer(*inputs: Tensor) -> Tensor:
        return cp_sparse_attention(*inputs, None, None, call)[0]

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        if recompute:
            out = checkpoint(layer, *tensors, use_reentrant=False)
        else:
            out = layer(*tensors)
    node = out.grad_fn
    held = [value for value in vars(node.session).values() if isinstance(value, Tensor)]  # type: ignore[union-attr]
    assert not held, "the session itself keeps tensors"
    out.square().sum().backward()
    assert tensors[1].grad is not None
    pairs = kv_blocks_by_owner(needed_kv_blocks(call.block_indices, layout.num_blocks), layout)
    return sorted(kept.values()), int(pairs.sum()), tensors[1].grad


def kept_by_full_layer(
    comm: KvComm, keep: bool, recompute: bool
) -> tuple[list[int], dict[str, int], list[Tensor]]:
    """The same of a dense layer over one document: bytes, what travelled, gradients of q, k and v."""
    comm, seq_len = comm.with_new_counters(), comm.size * NL * BLOCK_SIZE
    layout = ShardLayout(seq_len=seq_len, block_size=BLOCK_SIZE, cp_rank=comm.rank, cp_size=comm.size)
    plan = make_full_plan(layout, [0, seq_len], [seq_len], exchange=KvExchange.selected, balanced=False)
    call = FullAttentionArgs(plan, layout, comm, KvExchange.selected, 1.0, keep=keep)
    generator, T = torch.Generator().manual_seed(comm.rank), layout.local_seq_len
    shapes = ((M, G, D), (M, D), (M, D))
    tensors = [torch.randn(T, *s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    kept: dict[int, int] = {}

    def remember(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def layer(*inputs: Tensor) -> Tensor:
        return cp_full_attention(*inputs, call)

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        out = checkpoint(layer, *tensors, use_reentrant=False) if recompute else layer(*tensors)
    node = out.grad_fn
    while not hasattr(node, "session"):
        assert node is not None, "some node before the output is the attention"
        node = node.next_functions[0][0]
    held = [value for value in vars(node.session).values() if isinstance(value, Tensor)]
    assert not held, "the session itself keeps tensors"
    out.square().sum().backward()
    gradients = [x.grad for x in tensors if x.grad is not None]
    return sorted(kept.values()), dict(comm.counters.traffic.received), gradients


def worker(_rank: int, _world_size: int) -> dict[str, tuple[list[int], int, Tensor]]:
    assert dist.group.WORLD is not None
    comm = build_comm(dist.group.WORLD, KvExchange.selected, ExchangeConfig(), torch.device("cpu"), 60.0).kv
    keep, again = ExchangeConfig(), ExchangeConfig(keep_for_backward=False)
    return {
        "keep": kept_storages(comm, keep, False),
        "again": kept_storages(comm, again, False),
        "recompute": kept_storages(comm, keep, True),
    }


def full_worker(_rank: int, _world_size: int) -> list[tuple[list[int], dict[str, int], list[Tensor]]]:
    assert dist.group.WORLD is not None
    comm = build_comm(dist.group.WORLD, KvExchange.selected, ExchangeConfig(), torch.device("cpu"), 60.0).kv
    return [kept_by_full_layer(comm, *way) for way in ((True, False), (False, False), (True, True))]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, tuple[list[int], int, Tensor]]]:
    return run_ranks(2, worker, timeout_s=60)


def test_fetched_pairs_live_as_long_as_asked(ranks: list[dict[str, tuple[list[int], int, Tensor]]]) -> None:
    local, query = M * NL * PAIR_BYTES, NL * BLOCK_SIZE * M * G * D * 8
    assert [rank["keep"][1] for rank in ranks] == [0, 4 * M]
    for rank in ranks:
        fetched = rank["keep"][1] * PAIR_BYTES
        # q and out, lse, own pairs; and what was fetched.
        least = sorted([query, query, query // D, local])
        assert [n for n in rank["again"][0] if n] == least
        assert [n for n in rank["keep"][0] if n] == sorted(least + [fetched] * (fetched > 0))
        for name in ("again", "recompute"):
            assert torch.equal(rank[name][2], rank["keep"][2])


def test_a_dense_layer_keeps_what_it_is_told_to() -> None:
    fetched = NL * BLOCK_SIZE * 2 * M * D * 8
    for rank, (keep, again, recompute) in enumerate(run_ranks(2, full_worker, timeout_s=60)):
        more = sorted(keep[0])
        for size in again[0]:
            more.remove(size)
        # The last rank sees the first one's keys, never the other way round.
        assert [n for n in more if n] == [fetched] * rank
        assert keep[1].get("full_kv", 0) == again[1].get("full_kv_again", 0) == fetched * rank
        assert "full_kv_again" not in keep[1] or keep[1]["full_kv_again"] == 0
        for other in (again, recompute):
            for ours, theirs in zip(other[2], keep[2], strict=True):
                assert torch.equal(ours, theirs)

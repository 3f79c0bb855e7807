"""Between host and device: copies that come late, one rank's NCCL, and arguments that the host looks at."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from msa_kernels import DecodeCache, block_sparse_attention, decode_attention, select_blocks
from msa_kernels.arguments import readable
from torch import Tensor

from tests.helpers.device_jobs import HAS_GPU, Job, needs_device

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor

from msa_train.checkpoint.torch_dist.staging import HostStager
from msa_train.config import ExchangeConfig, KvExchange, ParallelConfig
from msa_train.parallel.comm import cp_comm as collectives
from msa_train.parallel.comm.p2p import start_all_to_all_rows
from msa_train.parallel.comm.to_device import to_device
from msa_train.parallel.process_groups import Groups, build_groups

pytestmark = pytest.mark.gpu
# Values of a tensor that is copied: more than a copy could bring between two lines of Python.
MANY = 2**24 if HAS_GPU else 2**12
# Products before it, which take a GPU a tenth of a second.
PRODUCTS, SIZE = (60, 8192) if HAS_GPU else (1, 8)


def here() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device())


def keep_busy() -> None:
    """Give the device work, behind which all that comes is late."""
    factor = torch.zeros(SIZE, SIZE, device=here(), dtype=torch.bfloat16)
    for _ in range(PRODUCTS):
        factor = factor @ factor


def snapshots(rank: int, world_size: int) -> list[dict[str, Any]]:
    """Of three saves into the same memory, what they hold of tensors that training changes at once."""
    buffers, found = HostStager(), []
    weight = torch.zeros(MANY, device=here())
    tensors = {
        "weight": weight,
        "half": weight.new_zeros(257, 3).to(torch.bfloat16),
        "part": weight[5 : MANY // 2],
    }
    for save in (1, 2, 3):
        keep_busy()
        weight.copy_(torch.arange(MANY, device=here()).float() * save)
        tensors["half"].fill_(save)
        shards: Any = {
            name: [ShardedTensor.from_rank_offsets(name, tensor, (0, 0, 1))]
            for name, tensor in tensors.items()
        }
        taken = buffers.stage(shards, {"step": save})
        for name in ("weight", "half"):
            tensors[name].fill_(-1)
        copies: dict[str, Any] = {name: entries[0].data for name, entries in taken.shards.items()}
        # torch asks only a device that it has started whether memory is locked
        assert buffers._is_locked
        assert not HAS_GPU or all(copy.is_pinned() for copy in copies.values())
        found.append({name: copy.double().sum().item() for name, copy in copies.items()} | {"step": save})
        assert torch.equal(copies["weight"], torch.arange(MANY).float() * save)
        assert torch.equal(copies["part"], copies["weight"][5 : MANY // 2])
        assert torch.equal(copies["half"], torch.full((257, 3), save, dtype=torch.bfloat16))
        torch.cuda.synchronize()
    return found


def numbers_to_the_host(rank: int, world_size: int) -> list[list[int]]:
    """What `CpComm.to_host` reads of numbers that the device has yet to compute."""
    comm = collectives.CpComm(None, 0, 1, device=here(), timeout_s=60.0)
    found = []
    for first in (1, 100):
        keep_busy()
        late = torch.arange(first, first + 5, device=here())
        found.append(comm.to_host(late, "request"))
        keep_busy()
        back = to_device(torch.arange(first, first + 5), here())
        found.append((back + 1).tolist())
    return found


def collectives_of_one(rank: int, world_size: int) -> dict[str, Any]:
    """Every collective of the exchange over the groups of a run, whose one rank keeps what it sends."""
    exchange = ExchangeConfig(ranks_per_node=-1)
    groups = build_groups(ParallelConfig(kv_exchange=KvExchange.auto), device=here(), exchange=exchange)
    x = torch.arange(12.0, device=here()).view(4, 3)
    found = {name: _by_torch(group, x) for name, group in _groups(groups).items()}
    comm = groups.cp_comm().kv
    ours: dict[str, Callable[[], Tensor]] = {
        "all_gather": lambda: comm.all_gather(x, "kv")[0],
        "reduce_scatter": lambda: comm.reduce_scatter(x[None], "kv"),
        "all_to_all": lambda: comm.all_to_all(x, [4], [4], "kv"),
        "shift": lambda: comm.shift([x], "kv").wait()[0],
    }
    found["comm"] = {name: call().cpu() for name, call in ours.items()}
    dist.barrier()
    assert comm.counters.traffic.received.get("kv", 0) == 0, "nothing came from another rank"
    parallel_state.destroy_model_parallel()
    return {"backend": dist.get_backend(groups.cp), "x": x.cpu(), "found": found}


def _groups(groups: Groups) -> dict[str, dist.ProcessGroup]:
    names = ("cp", "dp", "dp_cp", "ep", "expert_dp", "model_parallel")
    return {name: getattr(groups, name) for name in names}


def _by_torch(group: dist.ProcessGroup, x: Tensor) -> dict[str, Tensor]:
    """What goes through the group itself: with one rank `CpComm` has no need of it."""
    gathered, scattered, moved = (torch.full_like(x, -1) for _ in range(3))
    works = [
        collectives._gather(gathered, x, group=group, async_op=True),
        collectives._reduce_scatter(scattered, x, group=group, async_op=True),
        *start_all_to_all_rows(group, moved, x, [4], [4]),
    ]
    for work in works:
        work.wait()
    total = x.clone()
    dist.all_reduce(total, group=group)
    dist.barrier(group)
    results = {"gather": gathered, "reduce_scatter": scattered, "rows": moved, "sum": total}
    return {name: value.cpu() for name, value in results.items()}


def refusals(rank: int, world_size: int) -> dict[str, str]:
    """What is said of values out of range, where MSA_KERNELS_CHECK asks to look at the device's."""
    S, B = 64, 16
    q, k = torch.ones(2, 2, 16, device=here()), torch.ones(S, 2, 16, device=here())
    starts = torch.tensor([0, S])
    cache = DecodeCache(k[None], k[None], k[None, :, 0])
    lens = torch.tensor([S + 1], device=here())
    blocks = torch.tensor([[[0, S // B]] * 2] * 2, device=here())
    late = torch.tensor([0, S], device=here())
    kept_off = {"block_size": B, "topk": 2, "kernel": "cpu"}
    calls: dict[str, Callable[[], Any]] = {
        "position": lambda: select_blocks(q, k[:, 0], starts, position=late, **kept_off),
        "block_indices": lambda: block_sparse_attention(q, k, k, blocks, block_size=B, kernel="cpu"),
        "seq_lens": lambda: decode_attention(q[:1], q[:1], cache, lens, **kept_off),
        "cu_seqlens": lambda: select_blocks(q, k[:, 0], late + 1, **kept_off),
    }
    os.environ["MSA_KERNELS_CHECK"] = "0"
    assert not readable(late), "looking at it means waiting"
    os.environ["MSA_KERNELS_CHECK"] = "1"
    found = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    assert select_blocks(q, k[:, 0], starts, position=late.clamp(max=S - 1), **kept_off).is_cuda
    return found


SNAPSHOTS, NUMBERS, ALONE, REFUSED = (
    Job(fn) for fn in (snapshots, numbers_to_the_host, collectives_of_one, refusals)
)


@needs_device
def test_snapshot_holds_what_the_device_held() -> None:
    """Waited for before it is handed over, though the device had much to do and goes on at once."""
    found = SNAPSHOTS.result()
    assert [save["step"] for save in found] == [1, 2, 3]
    assert [save["half"] for save in found] == [257 * 3 * step for step in (1, 2, 3)]


@needs_device
def test_numbers_arrive_before_they_are_read() -> None:
    assert NUMBERS.result() == [
        [1, 2, 3, 4, 5],
        [2, 3, 4, 5, 6],
        [100, 101, 102, 103, 104],
        [101, 102, 103, 104, 105],
    ]


@needs_device
def test_collectives_of_one_rank() -> None:
    found = ALONE.result()
    assert found["backend"] == "nccl"
    for where, results in found["found"].items():
        for name, value in results.items():
            assert torch.equal(value, found["x"]), (where, name)


@needs_device
def test_values_out_of_range_are_refused_where_asked() -> None:
    found = REFUSED.result()
    assert found.keys() == {"position", "block_indices", "seq_lens", "cu_seqlens"}, found
    assert "position=64: must be from 0 to S - 1 = 63" in found["position"]
    assert "seq_lens=65: must be from 0 to the cache's capacity of 64 tokens" in found["seq_lens"]

"""Every rank writes its own share of a checkpoint: nothing is gathered, in any layout of either engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from msa_train.checkpoint.all_ranks import CheckpointError
from msa_train.checkpoint.compatibility import fingerprint
from msa_train.checkpoint.load import load_checkpoint
from msa_train.checkpoint.save import CheckpointSaver
from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist import regions
from msa_train.checkpoint.torch_dist.files import ShardedReader
from msa_train.checkpoint.torch_dist.reader import LoadStrategy, node_group
from msa_train.checkpoint.torch_dist.regions import Region
from msa_train.config import CheckpointConfig, EngineKind, Precision, RunConfig
from msa_train.training.engines.engine import TrainEngine
from tests.helpers import cuda_shim, devices
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.megatron_runs import build, train
from tests.helpers.pretended_gpu.build import needs_pretended_gpu
from tests.helpers.resume_runs import small_deepspeed
from tests.helpers.spawn import run_ranks

# dp2 x cp2 where nothing else is said
LAYOUTS: dict[str, tuple[EngineKind, dict[str, int]]] = {
    "megatron-ep2": (EngineKind.megatron, {"cp_size": 2, "ep_size": 2}),
    "megatron-ep4": (EngineKind.megatron, {"cp_size": 2, "ep_size": 4}),
    "megatron-tp2": (EngineKind.megatron, {"cp_size": 2, "tp_size": 2}),
    "torch-ep2": (EngineKind.torch, {"cp_size": 2, "ep_size": 2}),
    "torch-ep4": (EngineKind.torch, {"cp_size": 2, "ep_size": 4}),
    "deepspeed-z1": (EngineKind.deepspeed, {"cp_size": 2, "ep_size": 2}),
    "deepspeed-z2": (EngineKind.deepspeed, {"cp_size": 2, "ep_size": 4}),
    "deepspeed-z3": (EngineKind.deepspeed, {"cp_size": 2}),
    "megatron-gpu": (EngineKind.megatron, {"ep_size": 2}),
    "torch-gpu": (EngineKind.torch, {"ep_size": 2}),
}
ON_GPUS = ("megatron-gpu", "torch-gpu")
WORLD_SIZE, NODE_SIZE = 4, 2
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "gather", "broadcast", "all_reduce", "send", "recv")
# generators, and 1.2 KB around each stored tensor
OTHER_BYTES, BYTES_PER_BOX = 2**16, 1500


@dataclass(slots=True)
class Save:
    """What one rank did."""

    collectives: list[str]
    "while its state was listed"
    num_bytes: int
    "of the tensors that it writes"
    host_bytes: int
    "of the copy"
    num_boxes: int
    file_bytes: int
    device_bytes: int
    "on the GPU, at most, beyond what was there before"
    locked: bool
    "the copy is in locked memory"


@contextmanager
def spied() -> Iterator[list[str]]:
    """Names of the collectives that are called."""
    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            original = getattr(dist, name)

            def spy(*args: Any, _name: str = name, _original: Any = original, **named: Any) -> Any:
                called.append(_name)
                return _original(*args, **named)

            patch.setattr(dist, name, spy)
        yield called


def save_trained(engine: TrainEngine, folder: Path) -> Save:
    """One training step, saved twice; the second time, as in a run, nothing new is exchanged."""
    train(engine, steps=1)
    saver = CheckpointSaver(CheckpointStore(folder), CheckpointConfig(asynchronous=False, keep_last=1))
    meta = {"consumed_samples": 1, "fingerprint": fingerprint(RunConfig()), "layout": {}}
    saver.save(1, engine.sharded_state(loading=False), {}, meta, wait=True)
    on_gpu = engine.groups.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with spied() as called:
        state = engine.sharded_state(loading=False)
    taken: list[Any] = []
    stage = saver._buffers.stage
    saver._buffers.stage = lambda *given: taken.append(stage(*given)) or taken[-1]  # type: ignore[method-assign]
    saver.save(2, state, {}, meta, wait=True)
    files = CheckpointStore(folder).path(2).glob(f"__{dist.get_rank()}_*.distcp")
    return Save(
        collectives=called,
        num_bytes=taken[0].num_bytes,
        host_bytes=saver._buffers.num_bytes,
        num_boxes=sum(map(len, taken[0].shards.values())),
        file_bytes=sum(path.stat().st_size for path in files),
        device_bytes=torch.cuda.max_memory_allocated() - before if on_gpu else 0,
        locked=saver._buffers._buffer.is_pinned() if on_gpu else False,
    )


@dataclass(slots=True)
class Load:
    """What one rank read of the checkpoint that its layout saved, on nodes of two ranks."""

    is_equal: bool
    "everything has the bits that it had"
    num_bytes: int
    "read, of tensors"


def load_again(engine: TrainEngine, path: Path) -> Load:
    """Spoil the state of an engine and load it."""
    saved = [tensor.clone() for tensor in tensors_of(engine.sharded_state(loading=False))]
    for tensor in tensors_of(engine.sharded_state(loading=True)):
        tensor.detach().fill_(7.0)
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        original = regions.read_bytes
        patch.setattr(
            regions,
            "read_bytes",
            lambda file, at, out: read.append(len(out)) or original(file, at, out),
        )
        patch.setattr("msa_train.checkpoint.load.node_name", lambda: f"node{dist.get_rank() // NODE_SIZE}")
        state = load_checkpoint(path, engine.sharded_state(loading=True))
    engine.load_state(state, 1)
    loaded = tensors_of(engine.sharded_state(loading=False))
    return Load(
        is_equal=all(torch.equal(a, b) for a, b in zip(saved, loaded, strict=True)), num_bytes=sum(read)
    )


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    """Of a sharded state, where they are."""
    entries = nested_values(state)
    return [entry.data for entry in entries if isinstance(entry, ShardedTensor | ShardedTensorFactory)]


def saves_of(
    rank: int, world_size: int, folder: Path, names: list[str]
) -> tuple[dict[str, Save], dict[str, Load]]:
    if devices.chosen() == "cpu":
        cuda_shim.install()
    saves, loads = {}, {}
    for name in names:
        kind, sizes = LAYOUTS[name]
        zero = small_deepspeed(int(name[-1])) if kind is EngineKind.deepspeed else None
        engine = build(kind, parallel=sizes, precision=Precision.bf16, deepspeed=zero)
        saves[name] = save_trained(engine, folder / name)
        loads[name] = load_again(engine, CheckpointStore(folder / name).path(2))
        if name == "torch-ep2":
            check_a_short_file(engine, CheckpointStore(folder / name).path(2))
            check_a_rank_that_cannot_read(folder)
        leave_groups()
    return saves, loads


def check_a_short_file(engine: TrainEngine, path: Path) -> None:
    """One rank of a node meets it in what it reads for all: all ranks say so, and none waits."""
    dist.barrier()
    file = path / "__1_0.distcp"
    whole = file.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        file.write_bytes(whole[: len(whole) // 2])
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"could not be loaded: rank \d: "):
        load_checkpoint(path, engine.sharded_state(loading=True))
    if dist.get_rank() == 0:
        file.write_bytes(whole)
    dist.barrier()


def check_a_rank_that_cannot_read(folder: Path) -> None:
    """One that failed before takes part all the same: the others of its node read what they want."""
    file, values = folder / "values", torch.arange(6.0)
    if dist.get_rank() == 0:
        torch.save(values, file)
    dist.barrier()
    region = Region("values", 0, file.stat().st_size, (6,), (2,), (3,), "float32")
    out = torch.zeros(3)
    with node_group(["node"] * WORLD_SIZE) as node:
        strategy = LoadStrategy(node)
        if dist.get_rank() == 1:
            strategy.serve_others()
        else:
            strategy.read_together([(region, out)], folder)
            strategy.serve_others()
            assert torch.equal(out, values[2:5])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("shares")
    names = [name for name in LAYOUTS if name not in ON_GPUS]
    return folder, run_ranks(WORLD_SIZE, saves_of, folder, names)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ON_GPUS])
def test_every_rank_writes_an_even_share(name: str, saved: tuple[Path, list[Any]]) -> None:
    folder, by_rank = saved
    saves: list[Save] = [ranks[0][name] for ranks in by_rank]
    assert CheckpointStore(folder / name).verify(2) is None
    mean = sum(one.num_bytes for one in saves) / WORLD_SIZE
    for one in saves:
        assert one.collectives == []
        assert one.num_bytes <= 1.2 * mean
        assert one.num_bytes <= one.host_bytes <= 1.1 * one.num_bytes
        assert one.num_bytes < one.file_bytes
        assert one.file_bytes < one.num_bytes + one.num_boxes * BYTES_PER_BOX + OTHER_BYTES


def model_bytes(path: Path) -> int:
    """Of the tensors in a checkpoint that are not the optimizer's."""
    reader = ShardedReader(path)
    return sum(
        torch.Size(shape).numel() * reader.dtype(key).itemsize
        for key, shape in reader.shapes().items()
        if not key.startswith("optimizer.")
    )


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ON_GPUS])
def test_every_byte_is_read_once_on_a_node(name: str, saved: tuple[Path, list[Any]]) -> None:
    folder, by_rank = saved
    saves: list[Save] = [ranks[0][name] for ranks in by_rank]
    loads: list[Load] = [ranks[1][name] for ranks in by_rank]
    assert all(load.is_equal for load in loads)
    total = sum(save.num_bytes for save in saves)
    read = [load.num_bytes for load in loads]
    nodes = [sum(read[first : first + NODE_SIZE]) for first in range(0, WORLD_SIZE, NODE_SIZE)]
    if name == "torch-ep2":
        # both nodes hold everything
        assert nodes == [total, total]
        assert max(read) <= 1.2 * total / NODE_SIZE
    if name.startswith("megatron"):
        # what is of the model both read, but for experts that one of them has
        shared = model_bytes(CheckpointStore(folder / name).path(2))
        if name == "megatron-ep4":
            assert total < sum(nodes) < total + shared
        else:
            assert sum(nodes) == total + shared
        assert max(read) <= 1.2 * sum(nodes) / WORLD_SIZE


@needs_pretended_gpu
def test_a_gpu_needs_no_memory_to_save(tmp_path: Path) -> None:
    by_rank = run_ranks(2, saves_of, tmp_path, list(ON_GPUS), device="pretended")
    assert all(load.is_equal for _, loads in by_rank for load in loads.values())
    for one in [save for saves, _ in by_rank for save in saves.values()]:
        assert one.locked
        assert one.host_bytes <= 1.1 * one.num_bytes
        # smallest and largest number of each tensor
        assert one.device_bytes <= 64 * one.num_boxes

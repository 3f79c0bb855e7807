"""Every rank writes its own share of a checkpoint: nothing is gathered, in any layout of either engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from msa_train.checkpoint.compatibility import fingerprint
from msa_train.checkpoint.save import CheckpointSaver
from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import CheckpointConfig, EngineKind, Precision, RunConfig
from msa_train.training.engines.engine import TrainEngine
from tests.helpers import cuda_shim, devices
from tests.helpers.megatron_runs import build, train
from tests.helpers.pretended_gpu.build import needs_pretended_gpu
from tests.helpers.spawn import run_ranks

# dp2 x cp2 where nothing else is said
LAYOUTS: dict[str, tuple[EngineKind, dict[str, int]]] = {
    "megatron-ep2": (EngineKind.megatron, {"cp_size": 2, "ep_size": 2}),
    "megatron-ep4": (EngineKind.megatron, {"cp_size": 2, "ep_size": 4}),
    "megatron-tp2": (EngineKind.megatron, {"cp_size": 2, "tp_size": 2}),
    "torch-ep2": (EngineKind.torch, {"cp_size": 2, "ep_size": 2}),
    "torch-ep4": (EngineKind.torch, {"cp_size": 2, "ep_size": 4}),
    "megatron-gpu": (EngineKind.megatron, {"ep_size": 2}),
    "torch-gpu": (EngineKind.torch, {"ep_size": 2}),
}
ON_GPUS = ("megatron-gpu", "torch-gpu")
WORLD_SIZE = 4
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


def saves_of(rank: int, world_size: int, folder: Path, names: list[str]) -> dict[str, Save]:
    if devices.chosen() == "cpu":
        cuda_shim.install()
    found = {}
    for name in names:
        kind, sizes = LAYOUTS[name]
        found[name] = save_trained(build(kind, parallel=sizes, precision=Precision.bf16), folder / name)
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Save]]]:
    folder = tmp_path_factory.mktemp("shares")
    names = [name for name in LAYOUTS if name not in ON_GPUS]
    return folder, run_ranks(WORLD_SIZE, saves_of, folder, names)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ON_GPUS])
def test_every_rank_writes_an_even_share(name: str, saved: tuple[Path, list[dict[str, Save]]]) -> None:
    folder, by_rank = saved
    saves = [ranks[name] for ranks in by_rank]
    assert CheckpointStore(folder / name).verify(2) is None
    mean = sum(one.num_bytes for one in saves) / WORLD_SIZE
    for one in saves:
        assert one.collectives == []
        assert one.num_bytes <= 1.2 * mean
        assert one.num_bytes <= one.host_bytes <= 1.1 * one.num_bytes
        assert one.num_bytes < one.file_bytes
        assert one.file_bytes < one.num_bytes + one.num_boxes * BYTES_PER_BOX + OTHER_BYTES


@needs_pretended_gpu
def test_a_gpu_needs_no_memory_to_save(tmp_path: Path) -> None:
    by_rank: list[dict[str, Save]] = run_ranks(2, saves_of, tmp_path, list(ON_GPUS), device="pretended")
    for one in [save for saves in by_rank for save in saves.values()]:
        assert one.locked
        assert one.host_bytes <= 1.1 * one.num_bytes
        # smallest and largest number of each tensor
        assert one.device_bytes <= 64 * one.num_boxes

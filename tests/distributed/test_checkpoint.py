"""Checkpoints of real Megatron sharded tensors, written and read by gloo ranks."""

import io
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from msa_train.checkpoint.all_ranks import CheckpointError
from msa_train.checkpoint.compatibility import fingerprint
from msa_train.checkpoint.find import find_to_resume
from msa_train.checkpoint.load import (
    load_checkpoint,
    load_newest,
    load_weights,
    select_verified_checkpoint,
    verify_distributed,
)
from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.finite_state import DivergedError
from msa_train.checkpoint.torch_dist.rng_state import RNG_KEY, rng_state, set_rng_state
from msa_train.config import RunConfig
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.spawn import run_ranks

ROWS, COLUMNS, EXPERTS = 8, 6, 4
TIMEOUT_S = 120
BIG = 2**20


def weights(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=dtype).view(ROWS, COLUMNS) / 7


def expert(index: int) -> torch.Tensor:
    return torch.full((3,), float(index)).to(torch.bfloat16)


def sharded_state(rank: int, world_size: int, *, fill: bool = True) -> dict[str, Any]:
    """Rows over ranks, experts over ranks as an axis of their own, one replicated tensor, one object."""
    rows, num_local = ROWS // world_size, EXPERTS // world_size
    local = weights()[rank * rows : (rank + 1) * rows].clone()
    experts = [expert(rank * num_local + i) for i in range(num_local)]
    bias, moment = torch.linspace(-1, 1, 5), weights(torch.float64)[: rows * world_size].clone()
    if not fill:
        for tensor in (local, bias, moment, *experts):
            tensor.fill_(-99)

    def halves(key: str, data: torch.Tensor, replica_id: Any, flattened_range: Any) -> Any:
        return [
            ShardedTensor.from_rank_offsets(f"{key}.{i}", half.contiguous(), replica_id=replica_id)
            for i, half in enumerate(data.chunk(2))
        ]

    def join(parts: Any) -> torch.Tensor:
        return torch.cat(parts)

    return {
        "model": {
            "w": ShardedTensor.from_rank_offsets("w", local, (0, rank, world_size)),
            "bias": ShardedTensor.from_rank_offsets("bias", bias, replica_id=rank),
            "experts": [
                ShardedTensor.from_rank_offsets(
                    "experts", tensor, (0, rank * num_local + i, EXPERTS), prepend_axis_num=1
                )
                for i, tensor in enumerate(experts)
            ],
        },
        "optimizer": {
            "moment": ShardedTensorFactory("moment", moment, halves, join, replica_id=rank),
            "kind": ShardedObject("kind", "adam" if fill else None, (1,), (0,), replica_id=rank),
            "hyper": {"beta": 0.9, "steps": 3},
        },
    }


def check_state(state: dict[str, Any], rank: int, world_size: int) -> None:
    rows, num_local = ROWS // world_size, EXPERTS // world_size
    assert torch.equal(state["model"]["w"], weights()[rank * rows : (rank + 1) * rows])
    assert torch.equal(state["model"]["bias"], torch.linspace(-1, 1, 5))
    for i, got in enumerate(state["model"]["experts"]):
        assert torch.equal(got, expert(rank * num_local + i))
    assert torch.equal(state["optimizer"]["moment"], weights(torch.float64))
    assert state["optimizer"]["kind"] == "adam"
    assert state["optimizer"]["hyper"] == {"beta": 0.9, "steps": 3}
    assert state["data"] == {"position": [1, 2], "table": {"a": 0.5}}


def save(run_dir: Path, step: int, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "sharded_state": sharded_state(dist.get_rank(), dist.get_world_size()),
        "common": {"data": {"position": [1, 2], "table": {"a": 0.5}}},
        "meta": {"consumed_samples": step, "fingerprint": fingerprint(RunConfig()), "layout": {}},
    }
    save_checkpoint(CheckpointStore(run_dir), step=step, **(arguments | changes))


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def failure_of(work: Callable[[], object]) -> str:
    """What is raised, and that all ranks raise the same."""
    try:
        work()
    except CheckpointError as error:
        texts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, str(error))
        assert len(set(texts)) == 1, texts
        return str(error)
    raise AssertionError("nothing was raised")


def save_and_load_by_two(rank: int, world_size: int, folder: Path) -> None:
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(100 + rank)
    np.random.randn()  # a cached second normal is state too
    save(folder, 1)
    want = (*draw(), float(np.random.randn()))
    save(folder, 2)
    path = CheckpointStore(folder).path(1)
    for _ in range(2):
        state = load_checkpoint(path, sharded_state(rank, world_size, fill=False))
        check_state(state, rank, world_size)
        set_rng_state(state[RNG_KEY])
        assert (*draw(), float(np.random.randn())) == want
    assert verify_distributed(path) is None


def load_by_other_layout(rank: int, world_size: int, path: Path) -> None:
    state = load_checkpoint(path, sharded_state(rank, world_size, fill=False))
    check_state(state, rank, world_size)
    assert RNG_KEY not in state


def load_by_four(rank: int, world_size: int, path: Path) -> None:
    load_by_other_layout(rank, world_size, path)

    one_too_many = sharded_state(rank, world_size, fill=False)
    if rank == 2:
        one_too_many["extra"] = ShardedTensor.from_rank_offsets("extra", torch.zeros(2))
    text = failure_of(lambda: load_checkpoint(path, one_too_many))
    assert text.endswith("is not of this model: it lacks extra"), text

    one_too_few = sharded_state(rank, world_size, fill=False)
    del one_too_few["model"]["bias"]
    text = failure_of(lambda: load_checkpoint(path, one_too_few))
    assert text.endswith("is not of this model: it also has bias"), text

    wrong_shape = sharded_state(rank, world_size, fill=False)
    wrong_shape["model"]["bias"] = ShardedTensor.from_rank_offsets("bias", torch.zeros(6), replica_id=rank)
    text = failure_of(lambda: load_checkpoint(path, wrong_shape))
    assert "could not be loaded: rank 0" in text, text
    assert "bias" in text, text


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, save_and_load_by_two, folder, timeout_s=TIMEOUT_S)
    return folder


def test_two_ranks_save_and_load(saved: Path) -> None:
    store = CheckpointStore(saved)
    assert store.steps() == [1, 2]
    assert [store.verify(step) for step in store.steps()] == [None, None]
    names = {path.name for path in store.path(1).iterdir()}
    assert {"meta.json", "manifest.json", "metadata.json", ".metadata", "__0_0.distcp"} <= names
    assert "__1_0.distcp" in names


@pytest.mark.parametrize(("world_size", "scenario"), [(1, load_by_other_layout), (4, load_by_four)])
def test_other_layouts_load(saved: Path, world_size: int, scenario: Callable[..., None]) -> None:
    run_ranks(world_size, scenario, CheckpointStore(saved).path(1), timeout_s=TIMEOUT_S)


class Bomb:
    """Creates a file when it is unpickled by somebody who trusts it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def dumped(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load_bombs(rank: int, world_size: int, source: Path, folder: Path) -> None:
    """However a bomb is put in, and even where torch trusts all files, loading ends and nothing is run."""
    marker = folder / "executed"
    metadata = pickle.loads((source / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn.startswith("kind"))
    place, bomb = metadata.storage_data[index], dumped(Bomb(marker))
    objects = (source / place.relative_path).read_bytes()
    place.offset, place.length = len(objects), len(bomb)
    bombs = {
        "metadata": {".metadata": pickle.dumps(Bomb(marker))},
        "object": {".metadata": pickle.dumps(metadata), place.relative_path: objects + bomb},
        "common": {"common.pt": bomb},
    }
    for name, files in bombs.items():
        path = folder / name / source.name
        if rank == 0:
            shutil.copytree(source, path)
            for file, content in files.items():
                (path / file).write_bytes(content)
        dist.barrier()
        for template in (sharded_state(rank, world_size, fill=False), {}):
            text = failure_of(lambda path=path, template=template: load_checkpoint(path, template))
            assert "names " in text, (name, text)
            if name == "object":
                break
    text = failure_of(lambda: load_weights(folder / "metadata" / source.name, {}))
    assert "names " in text, text
    assert not marker.exists()


def test_code_in_a_checkpoint_is_not_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    run_ranks(2, load_bombs, CheckpointStore(saved).path(1), tmp_path, timeout_s=TIMEOUT_S)


def spoilt_weights(rank: int, world_size: int, folder: Path) -> None:
    """Numbers that are not finite on one rank: not saved by any, and an older checkpoint that has none."""
    store, config = CheckpointStore(folder), RunConfig(run_dir=str(folder))
    save(folder, 1)
    for value, place in ((float("nan"), "w"), (float("inf"), "w"), (float("-inf"), "moment")):
        state = sharded_state(rank, world_size)
        if place == "w" and rank == 1:
            state["model"]["w"].data[-1, -1] = value
        elif place == "moment":
            state["optimizer"]["moment"].data[0, 0] = value
        with pytest.raises(
            DivergedError, match=rf"^step 2: the update left {place}\S* not finite; the step is"
        ):
            save(folder, 2, sharded_state=state)
        dist.barrier()
        assert store.steps() == [1]
    # as versions before saved it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msa_train.checkpoint.save.not_finite", lambda _: set[str]())
        state = sharded_state(rank, world_size)
        if rank == 1:
            state["model"]["w"].data[0, 0] = float("nan")
        save(folder, 2, sharded_state=state)
    loaded: list[Any] = []
    found = load_newest(
        config,
        lambda found: loaded.append(load_checkpoint(found.path, sharded_state(rank, world_size, fill=False))),
    )
    assert found is not None
    # these checkpoints are saved without what a run notes about its schedule
    assert found.messages[0] == (
        "checkpoint step_2 is damaged (not finite: model.w) and is skipped; going on from step 1"
    )
    assert all("no record of its schedule" in message for message in found.messages[1:])
    (state,) = loaded
    check_state(state, rank, world_size)
    save(folder, 2)
    assert store.verify(2) is None


def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    run_ranks(2, spoilt_weights, tmp_path, timeout_s=TIMEOUT_S)


def damaged_by_byte(rank: int, world_size: int, folder: Path) -> None:
    config = RunConfig(run_dir=str(folder))
    assert verify_distributed(CheckpointStore(folder).path(2)) == "model file __1_0.distcp: checksum"
    found = select_verified_checkpoint(config)
    assert found is not None
    assert found.step == 1
    assert ["is damaged" in message for message in found.messages] == [True, False]
    config.model.num_layers = 12
    with pytest.raises(ValueError, match=r"model\.num_layers=12"):
        select_verified_checkpoint(config)
    assert select_verified_checkpoint(RunConfig(run_dir=str(folder / "none"))) is None


def test_flipped_byte_is_found_by_all_ranks(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shard = CheckpointStore(tmp_path).path(2) / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0x10
    shard.write_bytes(content)
    run_ranks(2, damaged_by_byte, tmp_path, timeout_s=TIMEOUT_S)
    found = find_to_resume(RunConfig(run_dir=str(tmp_path)))
    assert found is not None
    assert found.messages[0] == (
        "checkpoint step_2 is damaged (model file __1_0.distcp: checksum) and is skipped; "
        "going on from step 1"
    )


def failing_saves(rank: int, world_size: int, folder: Path, small_disk: Path | None) -> None:
    """Failures at every stage of a save; after each one the next save must work."""
    store = CheckpointStore(folder)
    big = {"big": ShardedTensor.from_rank_offsets("big", torch.zeros(BIG), (0, rank, world_size))}

    def limited(on_rank: int, **changes: Any) -> str:
        """A save while no file of one rank may grow beyond 64 KiB: as a full disk, but for one rank."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == on_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        try:
            return failure_of(lambda: save(folder, 2, **changes))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def left_as_before() -> None:
        dist.barrier()
        assert store.steps() == [1]
        assert store.verify(1) is None
        assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step_00000001"]
        dist.barrier()

    save(folder, 1)
    for on_rank in range(world_size):
        text = limited(on_rank, sharded_state=big)
        assert text.startswith(f"checkpoint of step 2 could not be saved: rank {on_rank}: "), text
        assert "File too large" in text or "unexpected pos" in text or "write" in text, text
        left_as_before()
    # common data are written by rank 0 alone, before the shards
    text = limited(0, common={"table": torch.zeros(BIG)})
    assert text.startswith("checkpoint of step 2 could not be saved: rank 0: "), text
    left_as_before()

    text = failure_of(lambda: save(folder, 2, common={"data": {"set": np.float64(1.5)}}))
    assert "rank 0: TypeError: common data ['data'" in text, text
    left_as_before()
    overlapping = {"w": ShardedTensor.from_rank_offsets("w", torch.zeros(2), replica_id=0)}
    text = failure_of(lambda: save(folder, 2, sharded_state=overlapping))
    assert "rank 0: CheckpointingException: Invalid " in text, text
    assert "access pattern" in text, text
    left_as_before()

    for stage in ("save_config", "publish"):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0 and stage == "publish":
                patch.setattr(store, "publish", no_space)
            elif rank == 0:
                patch.setattr("msa_train.checkpoint.torch_dist.writer.save_config", no_space)
            meta = {"consumed_samples": 1, "fingerprint": {}, "layout": {}}
            text = failure_of(
                lambda meta=meta: save_checkpoint(
                    store, step=2, sharded_state=sharded_state(rank, world_size), common={}, meta=meta
                )
            )
        assert text.endswith("rank 0: OSError: [Errno 28] No space left on device"), (stage, text)
        left_as_before()

    if small_disk is not None:
        text = failure_of(lambda: save(small_disk, 1, sharded_state=big))
        assert "could not be saved" in text, text
        assert CheckpointStore(small_disk).steps() == []
        save(small_disk, 2)
        assert CheckpointStore(small_disk).verify(2) is None
    save(folder, 2)
    assert store.verify(2) is None


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of 2 MiB, or None where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = (
        shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_failed_saves_fail_everywhere_and_publish_nothing(tmp_path: Path, small_disk: Path | None) -> None:
    run_ranks(2, failing_saves, tmp_path / "run", small_disk, timeout_s=TIMEOUT_S)


def killed_during_save(rank: int, world_size: int, folder: Path) -> None:
    save(folder, 1)
    with pytest.MonkeyPatch.context() as patch:
        # everything is written, nothing is published yet
        patch.setattr(CheckpointStore, "publish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save(folder, 2)


def save_again(rank: int, world_size: int, folder: Path) -> None:
    found = select_verified_checkpoint(RunConfig(run_dir=str(folder)))
    assert found is not None
    assert found.step == 1
    state = load_checkpoint(found.path, sharded_state(rank, world_size, fill=False))
    check_state(state, rank, world_size)
    save(folder, 2)


def test_kill_before_publishing_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0 ended by SIGKILL"):
        run_ranks(1, killed_during_save, tmp_path, timeout_s=TIMEOUT_S)
    store = CheckpointStore(tmp_path)
    assert store.steps() == [1]
    assert store.partial(2).is_dir()
    run_ranks(1, save_again, tmp_path, timeout_s=TIMEOUT_S)
    names = sorted(path.name for path in store.folder.iterdir())
    assert names == ["latest", "step_00000001", "step_00000002"]
    assert (store.folder / "latest").readlink() == Path("step_00000002")
    assert store.verify(2) is None


def test_rng_state_round_trip() -> None:
    state = rng_state()
    want = draw()
    assert draw() != want
    set_rng_state(state)
    assert draw() == want

"""Checkpoints that are written beside the training: what they hold, when they appear, how they fail."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from msa_train.checkpoint.all_ranks import CheckpointError
from msa_train.checkpoint.compatibility import fingerprint
from msa_train.checkpoint.load import load_checkpoint
from msa_train.checkpoint.save import CheckpointSaver
from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.staging import HostStager
from msa_train.config import CheckpointConfig, RunConfig, SaveFailure
from msa_train.runtime.fencing import GENERATION_NAME, VARIABLE
from tests.helpers.spawn import run_ranks

NO_SPACE = OSError(28, "No space left on device")


class Writing:
    """One run whose only state is a tensor of rows over ranks; its writer can be held up or broken.

    publish: what is done before a checkpoint is published, on rank 0.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.store = CheckpointStore(folder)
        self.waits: list[float] = []
        config = replace(CheckpointConfig(keep_last=0), **settings)
        self.saver = CheckpointSaver(self.store, config, sleep=self.waits.append)
        self.weight = torch.zeros(3)
        self.gate = threading.Event()
        self.publish: Callable[[], object] = self.gate.wait
        original = self.store.publish

        def publish(step: int) -> Path:
            self.publish()
            return original(step)

        self.store.publish = publish  # type: ignore[method-assign]

    def state(self) -> dict[str, Any]:
        """Sharded over the ranks."""
        place = (0, dist.get_rank(), dist.get_world_size())
        return {"w": ShardedTensor.from_rank_offsets("w", self.weight, place)}

    def save(self, step: int, **arguments: Any) -> list[int]:
        """Steps of the saves that have ended."""
        self.weight.fill_(step)
        meta = {"consumed_samples": step, "fingerprint": fingerprint(RunConfig()), "layout": {}}
        reports = self.saver.save(step, self.state, {"step": step}, meta, **arguments)
        self.weight.fill_(-1)
        return [report.step for report in reports]

    def check(self, step: int) -> None:
        """The checkpoint holds what was there when the save began."""
        assert self.store.verify(step) is None
        self.weight.fill_(-2)
        state = load_checkpoint(self.store.path(step), self.state())
        assert torch.equal(state["w"], torch.full((3,), float(step)))
        assert state["step"] == step

    def ended(self) -> str:
        """The error of the save under way, when it has ended."""
        try:
            reports = self.saver.wait()
        except CheckpointError as error:
            return str(error)
        return ";".join(report.error for report in reports)


def beside_the_training(rank: int, world_size: int, folder: Path) -> None:
    run = Writing(folder)
    assert run.save(1) == []
    # the default group is free for the training
    total = torch.ones(1)
    for _ in range(20):
        dist.all_reduce(total)
    assert run.saver.finished() == []
    assert run.store.steps() == []
    assert not (run.store.folder / "latest").exists()
    run.gate.set()
    (report,) = run.saver.wait()
    assert (report.step, report.error, report.num_bytes) == (1, "", 3 * 4 * world_size)
    assert 0 < report.pause_s < report.write_s + report.pause_s
    assert run.saver.finished() == []
    dist.barrier()
    assert (run.store.folder / "latest").readlink() == Path("step_00000001")
    run.check(1)

    # one at a time: the third save waits for the second
    order: list[str] = []
    run.publish = lambda: order.append("published")
    assert run.save(2) == []
    assert run.save(3) == [2]
    assert run.save(4, wait=True) == [3, 4]
    assert order == (["published"] * 3 if rank == 0 else [])
    dist.barrier()
    for step in (2, 3, 4):
        run.check(step)


def failures(rank: int, world_size: int, folder: Path) -> None:
    def no_space() -> None:
        raise NO_SPACE

    run = Writing(folder / "end")
    run.publish = lambda: None
    run.save(1, wait=True)
    run.publish = no_space
    run.save(2)
    text = "checkpoint of step 2 could not be saved: rank 0: OSError: [Errno 28] No space left on device"
    assert run.ended() == text
    assert run.store.steps() == [1]

    # asked for when the next save begins, too, and on every rank
    run.save(2)
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        run.save(3)
    run.publish = lambda: None
    run.save(4, wait=True)
    run.check(4)

    run = Writing(folder / "go_on", on_failure=SaveFailure.go_on, keep_last=1)
    run.publish = no_space
    run.save(1)
    (report,) = run.saver.wait()
    assert report.error.endswith("No space left on device")
    assert report.lines() == [f"{report.error}; training goes on"]
    assert report.metrics()["checkpoint_failed_step"] == 1
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        run.save(2, wait=True)

    attempts: list[int] = []

    def fails_twice() -> None:
        attempts.append(1)
        if len(attempts) < 3:
            no_space()

    run = Writing(folder / "retries", retries=2)
    run.publish = fails_twice
    run.save(1)
    (report,) = run.saver.wait()
    assert (report.error, len(report.notes), run.waits) == ("", 2, [1.0, 2.0])
    assert report.notes[0].endswith("; trying again")
    run.check(1)

    # a later start has taken over: not even where the run goes on without checkpoints
    run = Writing(folder / "superseded", on_failure=SaveFailure.go_on, retries=2)
    run.publish = lambda: (folder / "superseded" / GENERATION_NAME).write_text("7.1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "7.0")
        run.save(1)
        assert "start 7.1 has taken over from start 7.0" in run.ended()
    assert (run.store.steps(), run.waits) == ([], [])

    # what one rank cannot copy is no checkpoint on any
    run = Writing(folder / "copy", asynchronous=False)
    run.publish = lambda: None
    if rank == 1:
        run.state = lambda: {"w": object()}  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"step 1 could not be saved: rank [01]: "):
        run.save(1)
    assert run.store.steps() == []


def too_little_space(rank: int, world_size: int, folder: Path) -> None:
    run = Writing(folder)
    run.publish = lambda: None
    run.save(1, wait=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msa_train.checkpoint.store.free_bytes", lambda _: 10**6)
        run.save(2)
        text = run.ended()
    assert "step 2 could not be saved: rank 0: OSError: it needs 0.00105 GB and " in text
    assert "0.001 GB free, the checkpoint of step 1 stays; free some space, or lower" in text
    assert sorted(path.name for path in run.store.folder.iterdir()) == ["latest", "step_00000001"]
    run.check(1)


@pytest.mark.parametrize("scenario", [beside_the_training, failures, too_little_space])
def test_two_ranks(scenario: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(2, scenario, tmp_path / "run", timeout_s=120)


def test_snapshots_use_their_memory_again() -> None:
    base = torch.arange(12.0).view(3, 4)
    shards = {
        key: [ShardedTensor.from_rank_offsets(key, view)]
        for key, view in {"rows": base, "same": base, "column": base[:, 1], "empty": base[:0]}.items()
    }
    buffers = HostStager()
    first = buffers.stage(shards, {"a": [1]})  # type: ignore[arg-type]
    places = {key: entries[0].data.data_ptr() for key, entries in first.shards.items()}  # type: ignore[union-attr]
    assert places["rows"] == places["same"] != base.data_ptr()
    assert first.num_bytes == (12 + 12 + 3) * 4
    base.zero_()
    wanted = {"rows": torch.arange(12.0).view(3, 4), "column": torch.tensor([1.0, 5.0, 9.0])}
    for key, value in wanted.items():
        assert torch.equal(first.shards[key][0].data, value)  # type: ignore[arg-type]
    second = buffers.stage(shards, {})  # type: ignore[arg-type]
    assert {key: entries[0].data.data_ptr() for key, entries in second.shards.items()} == places  # type: ignore[union-attr]
    assert not second.shards["rows"][0].data.any()  # type: ignore[union-attr]

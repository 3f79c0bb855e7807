"""Saving by all ranks together: a copy while the training stands still, then writing beside it.

Each rank has a thread that writes; these threads meet in a process group of their own, so that they never
come between the collectives of the training. One checkpoint at a time: the next one waits for it.
"""

import io
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

import msa_train
from msa_train.config import CheckpointConfig, SaveFailure
from msa_train.model.checkpoint_pickles import check_object
from msa_train.training.checkpoint_files import MANIFEST_NAME, META_NAME, file_entry, write_json
from msa_train.training.checkpoint_meta import FORMAT_VERSION
from msa_train.training.checkpoint_store import CheckpointStore
from msa_train.training.divergence import spoilt_state
from msa_train.training.finite_state import listed, not_finite
from msa_train.training.rng import RNG_KEY, rng_shard, rng_state
from msa_train.training.save_strategy import Shards, shards_to_write, write_shards
from msa_train.training.snapshot import HostBuffers, Snapshot, tensors_of
from msa_train.training.together import CheckpointError, together, works

# A rank may be this far behind the others with its files
WRITE_TIMEOUT = timedelta(hours=2)
# How long a run that has failed waits for a checkpoint that is being written
CLOSE_WITHIN_S = 20.0
LONGEST_WAIT_S = 30.0
WAITS_FOR_OTHERS = "waiting for other ranks with"
# What a checkpoint has besides tensors, generously
_OTHER_BYTES = 2**20
_SHARD_FILE = re.compile(r"__(\d+)_\d+\.distcp")


@dataclass(slots=True)
class SaveReport:
    """How a save went.

    pause_s: the training stood still; write_s: from then on until it was visible; num_bytes: tensors of all
    ranks. error: why there is no checkpoint, one line. must_end: it ends the run, whatever on_failure says.
    notes: for the user.
    """

    step: int
    pause_s: float
    write_s: float = 0.0
    num_bytes: int = 0
    error: str = ""
    must_end: bool = False
    notes: list[str] = field(default_factory=list[str])

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        if self.error:
            return {"checkpoint_failed_step": self.step, "checkpoint_pause_s": self.pause_s}
        return {
            "checkpoint_step": self.step,
            "checkpoint_pause_s": self.pause_s,
            "checkpoint_write_s": self.write_s,
            "checkpoint_bytes": self.num_bytes,
        }

    def lines(self) -> list[str]:
        """For the terminal."""
        if self.error:
            return [*self.notes, f"{self.error}; training goes on"]
        times = f"written in {self.write_s:.1f} s, training paused {self.pause_s:.2f} s"
        return [*self.notes, f"checkpoint step {self.step} {times}"]


class CheckpointSaver:
    """Saves the checkpoints of one run. All ranks make one and call it alike.

    Args:
        store: of the run, on a disk that all ranks share.
        config: asynchronous, retries, on_failure, keep_last and keep_every.
        group: all ranks, used by nothing else; None: makes one, which all ranks must do at once.
        clock: seconds; sleep: waits that many. For tests.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        group: dist.ProcessGroup | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.store, self.config = store, config
        self.group = group or _own_group()
        self._clock, self._sleep = clock, sleep
        self._buffers = HostBuffers()
        self._is_validated = False
        self._thread: threading.Thread | None = None
        self._report: SaveReport | None = None
        self._writing: tuple[int, int] | None = None

    def stands_at(self) -> str:
        """What a save that is under way is at, for a watchdog; empty if there is none, any thread may ask.

        Ranks that only wait for another one say WAITS_FOR_OTHERS.
        """
        if self._writing is None:
            return ""
        step, thread = self._writing
        return f"{'writing' if works(thread) else WAITS_FOR_OTHERS} the checkpoint of step {step}"

    def save(
        self,
        step: int,
        sharded_state: Callable[[], dict[str, Any]] | dict[str, Any],
        common: dict[str, Any],
        meta: dict[str, Any],
        *,
        wait: bool = False,
    ) -> list[SaveReport]:
        """Save a checkpoint, after the one before it is written.

        The state of this rank's random number generators is stored besides what is given.

        Args:
            step: steps made.
            sharded_state: Megatron ShardedTensors, ShardedObjects and factories, nested; plain values among
                them are treated as `common`. Or what makes them; its time counts as a pause.
            common: plain data, the same on all ranks: numbers, text, tensors, lists and dicts of them.
            meta: `consumed_samples`, `fingerprint` and `layout`, for meta.json.
            wait: return when the checkpoint is visible; it must succeed.

        Returns:
            Saves that have come to an end: of the one before, and of this one unless it goes on beside the
            training.

        Raises:
            CheckpointError: naming the rank and the cause, with `wait` or where on_failure=end. No folder is
                published.
            SpoiltStateError: if weights or moments are not finite.
        """
        begin = self._clock()
        ended = self.wait()
        try:
            snapshot = self._copy(step, sharded_state, common, meta)
        except CheckpointError as error:
            failed = SaveReport(step, self._clock() - begin, error=_failure_text(step, error))
            return [*ended, *self._checked(failed, must_succeed=wait)]
        self._report = SaveReport(step, self._clock() - begin)
        arguments = (self._report, *snapshot, meta)
        if self.config.asynchronous:
            self._thread = threading.Thread(
                target=self._write, args=arguments, name="checkpoint", daemon=True
            )
            self._thread.start()
            return [*ended, *(self.wait(must_succeed=True) if wait else [])]
        self._write(*arguments)
        self._report.pause_s = self._clock() - begin
        return [*ended, *self.wait(must_succeed=wait)]

    def finished(self) -> list[SaveReport]:
        """The save that has ended since this was asked last, if any; returns at once.

        Raises:
            CheckpointError: if it failed, where on_failure=end.
        """
        return [] if self._thread is not None and self._thread.is_alive() else self.wait()

    def wait(self, *, must_succeed: bool = False) -> list[SaveReport]:
        """As `finished`, after the save that is under way.

        Raises:
            CheckpointError: if it failed, where on_failure=end or must_succeed.
        """
        if self._thread is not None:
            self._thread.join()
        report, self._thread, self._report = self._report, None, None
        return [] if report is None else self._checked(report, must_succeed=must_succeed)

    def close(self) -> None:
        """Give the save that is under way a little time, whatever comes of it: the run has failed."""
        if self._thread is not None:
            self._thread.join(CLOSE_WITHIN_S)

    def _checked(self, report: SaveReport, *, must_succeed: bool = False) -> list[SaveReport]:
        must_end = must_succeed or report.must_end
        if report.error and (must_end or self.config.on_failure is SaveFailure.end):
            raise CheckpointError(report.error)
        return [report]

    def _copy(
        self,
        step: int,
        sharded_state: Callable[[], dict[str, Any]] | dict[str, Any],
        common: dict[str, Any],
        meta: dict[str, Any],
    ) -> tuple[Snapshot, int]:
        """This rank's snapshot, and the bytes of all ranks'."""
        assert {"consumed_samples", "fingerprint"} <= set(meta), f"meta lacks keys, it has {sorted(meta)}"
        given = sharded_state() if callable(sharded_state) else sharded_state
        state = {**common, **given, RNG_KEY: rng_shard(rng_state())}
        assert len(state) == len(common) + len(given) + 1, "common and sharded_state share a key"
        taken: list[Snapshot] = []

        def copy() -> tuple[int, set[str]]:
            sharded: Any
            sharded, plain = save_preprocess(state, validate_access_integrity=False)
            if dist.get_rank() == 0:
                _check_readable(plain, f"common data {sorted(plain)}")
            shards = shards_to_write(sharded)
            if not self._is_validated:
                _check_objects(shards)
            spoilt = not_finite(tensors_of(shards))
            if not spoilt:
                taken.append(self._buffers.take(shards, plain))
            return taken[0].num_bytes if taken else 0, spoilt

        def validate() -> None:
            save_preprocess(state, validate_access_integrity=True)

        copied = together(copy, self.group)
        names = listed(spoilt for _, spoilt in copied)
        if names:
            raise spoilt_state(step, names, self.store)
        if not self._is_validated:
            # the same in all saves of a run
            together(validate, self.group)
            self._is_validated = True
        return taken[0], sum(num_bytes for num_bytes, _ in copied)

    def _write(self, report: SaveReport, snapshot: Snapshot, num_bytes: int, meta: dict[str, Any]) -> None:
        """Write and publish, again where that fails and retries are left; never raises."""
        begin, rank = self._clock(), dist.get_rank()
        report.num_bytes, self._writing = num_bytes, (report.step, threading.get_ident())
        for attempt in range(self.config.retries + 1):
            try:
                self._write_once(report, snapshot, meta)
                report.error = ""
                break
            except Exception as error:
                report.error = _failure_text(report.step, error)
                report.must_end = isinstance(error, CheckpointError) and error.is_final
                if report.must_end:
                    break
                if rank == 0:
                    self.store.abandon(report.step)
            if attempt < self.config.retries:
                report.notes.append(f"{report.error}; trying again")
                self._sleep(min(2.0**attempt, LONGEST_WAIT_S))
        self._writing = None
        report.write_s = self._clock() - begin

    def _write_once(self, report: SaveReport, snapshot: Snapshot, meta: dict[str, Any]) -> None:
        store, step, rank = self.store, report.step, dist.get_rank()
        folder = store.partial(step)

        def begin() -> None:
            if rank == 0:
                report.notes += store.clear()
                store.check_space(report.num_bytes + _OTHER_BYTES)
                store.make_partial(step)

        together(begin, self.group)
        write_shards(snapshot.shards, snapshot.common, folder, self.group)
        entries = together(
            lambda: {path.name: file_entry(path) for path in _files_of_rank(folder, rank)}, self.group
        )
        files = {name: entry for part in entries for name, entry in part.items()}
        together(lambda: self._publish(step, files, meta) if rank == 0 else None, self.group)
        if rank == 0:
            try:
                store.prune(self.config.keep_last, self.config.keep_every)
            except OSError as error:
                report.notes.append(f"older checkpoints could not be removed: {error}")

    def _publish(self, step: int, files: dict[str, Any], meta: dict[str, Any]) -> None:
        folder = self.store.partial(step)
        content = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "msa_train_version": msa_train.__version__,
            "megatron_core_version": megatron_version,
            "world_size": dist.get_world_size(),
            **meta,
        }
        write_json(folder / META_NAME, content)
        files[META_NAME] = file_entry(folder / META_NAME)
        write_json(folder / MANIFEST_NAME, {"checksum": "crc32", "files": dict(sorted(files.items()))})
        self.store.publish(step)


def save_checkpoint(
    store: CheckpointStore,
    *,
    step: int,
    sharded_state: dict[str, Any],
    common: dict[str, Any],
    meta: dict[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write and publish one checkpoint and wait for it; see CheckpointSaver.save. Removes no older one.

    Raises:
        CheckpointError: naming the rank and the cause; no folder is published then.
    """
    config = CheckpointConfig(asynchronous=False, keep_last=0)
    CheckpointSaver(store, config, group or dist.group.WORLD).save(step, sharded_state, common, meta)


def _own_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup), "every rank is in it"
    return group


def _failure_text(step: int, error: Exception) -> str:
    return f"checkpoint of step {step} could not be saved: {error}"


def _check_objects(shards: Shards) -> None:
    for key, entries in shards.items():
        for entry in entries:
            if isinstance(entry, ShardedObject):
                _check_readable(entry.data, f"object {key}")


def _check_readable(value: Any, name: str) -> None:
    """Nothing but plain values and tensors is read from a checkpoint; find out now, not when it is needed."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    try:
        check_object(buffer.getvalue(), name)
    except ValueError as error:
        raise TypeError(f"{name} must be plain values and tensors ({error.__cause__})") from error


def _files_of_rank(folder: Path, rank: int) -> Iterable[Path]:
    """Files that this rank wrote; rank 0 also wrote those that belong to no rank."""
    for path in sorted(folder.iterdir()):
        match = _SHARD_FILE.fullmatch(path.name)
        if rank == (int(match[1]) if match else 0):
            yield path

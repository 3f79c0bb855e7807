"""Save by all ranks together: a copy while the training stands still, then writing beside it.

    save    training thread   wait for the save before; check that all is finite; copy to host memory
    _write  checkpoint thread begin: clear leftovers, check the space, make .step_N.partial     rank 0
                              ShardWriter: Megatron's files, one .distcp of each rank          all ranks
                              size and CRC-32 of own files, gathered                            all ranks
                              meta.json, manifest.json, rename to step_N, latest, prune         rank 0

Each rank has a thread that writes; these threads meet in a process group of their own. In a group that the
training uses too, one rank's thread could enter a collective while another rank's training enters one: each
would take part in the other's, and both hang or mix up data. The group is gloo, so the thread touches no GPU.
One checkpoint at a time: the next one waits for it, since both would use the same host buffers.

Costs with Adam in bf16: 14 bytes per parameter, bf16 weights 2 and fp32 weights and two moments 12. Each rank
copies and writes its own share of them (see `torch_dist/shares.py`), nothing is gathered on any GPU or host.
For m3, 60 layers of 426B parameters, that is 6.0 TB whatever the sequence length. By arithmetic over the
shapes on 256 ranks, pp 4, cp 64, ep 64: 20.0 to 24.6 GB of each rank (stages differ), mean 23.3, in 296 to
408 pieces; 256 .distcp files and 5 more, among them `.metadata` with 16 MB. Planning takes rank 0's writing
thread 4.5 s of a core and 0.4 GB in the first save, that list 3.5 s in each, measured with shards without
content (benchmarks/results/checkpoint_plan.md). Every file is read once again for its checksum.
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
from msa_train.checkpoint.all_ranks import CheckpointError, run_on_all_ranks, works
from msa_train.checkpoint.manifest import MANIFEST_NAME, file_entry
from msa_train.checkpoint.meta import FORMAT_VERSION, META_NAME
from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.finite_state import listed, not_finite, spoilt_state
from msa_train.checkpoint.torch_dist.rng_state import RNG_KEY, rng_shard, rng_state
from msa_train.checkpoint.torch_dist.safe_pickles import check_object
from msa_train.checkpoint.torch_dist.shares import Shares
from msa_train.checkpoint.torch_dist.staging import HostStager, StagedState, tensors_of
from msa_train.checkpoint.torch_dist.writer import Shards, ShardWriter, shards_of
from msa_train.config import CheckpointConfig, SaveFailure
from msa_train.runtime.atomic_files import write_json

# A rank may be this far behind the others with its files; far more than a collective of the training may take
WRITE_TIMEOUT = timedelta(hours=2)
# How long a run that has failed waits for a checkpoint that is being written
CLOSE_WITHIN_S = 20.0
# between two tries, which come after 1, 2, 4, ... s
LONGEST_WAIT_S = 30.0
# begins what `stands_at` says of ranks that are not to blame for a standstill
WAITS_FOR_OTHERS = "waiting for other ranks with"
# What a checkpoint has besides tensors, generously
_OTHER_BYTES = 2**20
_SHARD_FILE = re.compile(r"__(\d+)_\d+\.distcp")


@dataclass(slots=True)
class SaveReport:
    """Hold how a save went."""

    step: int
    "updates made"
    pause_s: float
    "seconds for which the training stood still"
    write_s: float = 0.0
    "seconds from then on until it was visible"
    num_bytes: int = 0
    "of the tensors of all ranks"
    error: str = ""
    "why there is no checkpoint, one line; empty if there is one"
    must_end: bool = False
    "the error ends the run, whatever on_failure says"
    notes: list[str] = field(default_factory=list[str])
    "lines for the user"

    def metrics(self) -> dict[str, float]:
        """Return what metrics.jsonl keeps of it."""
        if self.error:
            return {"checkpoint_failed_step": self.step, "checkpoint_pause_s": self.pause_s}
        return {
            "checkpoint_step": self.step,
            "checkpoint_pause_s": self.pause_s,
            "checkpoint_write_s": self.write_s,
            "checkpoint_bytes": self.num_bytes,
        }

    def lines(self) -> list[str]:
        """Return what the terminal shows of it."""
        if self.error:
            return [*self.notes, f"{self.error}; training goes on"]
        times = f"written in {self.write_s:.1f} s, training paused {self.pause_s:.2f} s"
        return [*self.notes, f"checkpoint step {self.step} {times}"]


class CheckpointSaver:
    """Save the checkpoints of one run. All ranks make one and call it alike.

    Args:
        store: of the run, on a disk that all ranks share.
        config: asynchronous, retries, on_failure, keep_last, keep_every and keep_stage_ends.
        group: all ranks, used by nothing else; None: makes one, which all ranks must do at once.
        make_buffer: makes the memory that a state is copied to, see HostStager.
        clock: tells seconds, for tests.
        sleep: waits that many seconds, for tests.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        group: dist.ProcessGroup | None = None,
        *,
        make_buffer: Callable[[int], torch.Tensor] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.store, self.config = store, config
        self.group = group or _own_group()
        self._clock, self._sleep = clock, sleep
        self._buffers, self._shares = HostStager(make_buffer), Shares(self.group)
        self._writer = ShardWriter(self.group)
        self._is_validated = False
        "the layout of the shards has been checked, which is the same in all saves of a run"
        self._thread: threading.Thread | None = None
        self._report: SaveReport | None = None
        self._writing: tuple[int, int] | None = None
        "step and thread of the save that is under way"

    def stands_at(self) -> str:
        """Tell what a save that is under way is at, for a watchdog; empty if none is. Any thread may ask.

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
        """Return the save that has ended since this was asked last, if any, at once.

        Raises:
            CheckpointError: if it failed, where on_failure=end.
        """
        return [] if self._thread is not None and self._thread.is_alive() else self.wait()

    def wait(self, *, must_succeed: bool = False) -> list[SaveReport]:
        """Wait for the save that is under way and return it, as `finished`.

        Args:
            must_succeed: raise whatever on_failure says.

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
        """Raise if a failed save ends the run; all ranks have the same report, so all raise."""
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
    ) -> tuple[StagedState, int]:
        """Copy this rank's state to the host; return the copy, and the bytes of all ranks' copies.

        One pass over the tensors looks for what is not finite, before they are copied: a spoilt state must
        not take the place of the checkpoint to go back to.
        """
        assert {"consumed_samples", "fingerprint"} <= set(meta), f"meta lacks keys, it has {sorted(meta)}"
        given = sharded_state() if callable(sharded_state) else sharded_state
        state = {**common, **given, RNG_KEY: rng_shard(rng_state())}
        assert len(state) == len(common) + len(given) + 1, "common and sharded_state share a key"
        held: list[tuple[Shards, dict[str, Any]]] = []
        taken: list[StagedState] = []

        def prepare() -> None:
            sharded: Any
            sharded, plain = save_preprocess(state, validate_access_integrity=False)
            if dist.get_rank() == 0:
                _check_readable(plain, f"common data {sorted(plain)}")
            held.append((shards_of(sharded), plain))

        def copy() -> tuple[int, set[str]]:
            shards, plain = self._shares.own(held[0][0]), held[0][1]
            if not self._is_validated:
                _check_objects(shards)
            # what is made only for the copy is looked at there
            spoilt = not_finite((key, one) for key, one in tensors_of(shards) if not one.is_meta)
            if spoilt:
                return 0, spoilt
            taken.append(self._buffers.stage(shards, plain))
            copies = zip(tensors_of(shards), tensors_of(taken[0].shards), strict=True)
            made = ((key, one) for (key, source), (_, one) in copies if source.is_meta)
            return taken[0].num_bytes, not_finite(made)

        # Megatron's check that shards fit together exchanges among all ranks, so none may have left `copy`
        # with an error before it.
        def validate() -> None:
            save_preprocess(state, validate_access_integrity=True)

        run_on_all_ranks(prepare, self.group)
        self._shares.learn(held[0][0])
        copied = run_on_all_ranks(copy, self.group)
        names = listed(spoilt for _, spoilt in copied)
        if names:
            raise spoilt_state(step, names, self.store)
        if not self._is_validated:
            # the same in all saves of a run
            run_on_all_ranks(validate, self.group)
            self._is_validated = True
        return taken[0], sum(num_bytes for num_bytes, _ in copied)

    def _write(self, report: SaveReport, snapshot: StagedState, num_bytes: int, meta: dict[str, Any]) -> None:
        """Write and publish, again where that fails and retries are left; never raises.

        Errors are of `run_on_all_ranks`, so all ranks have the same one and try again as often.

        Example: retries=2 and a full disk: three tries, 1 s and 2 s apart, then `error` is set.
        """
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

    def _write_once(self, report: SaveReport, snapshot: StagedState, meta: dict[str, Any]) -> None:
        """Write, gather checksums, publish, prune; see the module for who does what."""
        store, step, rank = self.store, report.step, dist.get_rank()
        folder = store.partial(step)

        def begin() -> None:
            if rank == 0:
                report.notes += store.clear()
                store.check_space(report.num_bytes + _OTHER_BYTES)
                store.make_partial(step)

        run_on_all_ranks(begin, self.group)
        self._writer.write(snapshot.shards, snapshot.common, folder)
        # Each rank reads its own files again, mostly from the page cache: one rank alone would read all 6 TB.
        entries = run_on_all_ranks(
            lambda: {path.name: file_entry(path) for path in _files_of_rank(folder, rank)}, self.group
        )
        files = {name: entry for part in entries for name, entry in part.items()}
        run_on_all_ranks(lambda: self._publish(step, files, meta) if rank == 0 else None, self.group)
        if rank == 0:
            # after the new one is published, and no failure of it
            try:
                config = self.config
                store.prune(config.keep_last, config.keep_every, keep_stage_ends=config.keep_stage_ends)
            except OSError as error:
                report.notes.append(f"older checkpoints could not be removed: {error}")

    def _publish(self, step: int, files: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write meta.json, then manifest.json with the checksums of all files, and publish. Rank 0 only."""
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


def _own_group() -> dist.ProcessGroup:
    """Make the group of the writing threads."""
    group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup), "every rank is in it"
    return group


def _failure_text(step: int, error: Exception) -> str:
    """Say that a save failed, in one line."""
    return f"checkpoint of step {step} could not be saved: {error}"


def _check_objects(shards: Shards) -> None:
    """Make sure that every object among the shards can be read again."""
    for key, entries in shards.items():
        for entry in entries:
            if isinstance(entry, ShardedObject):
                _check_readable(entry.data, f"object {key}")


def _check_readable(value: Any, name: str) -> None:
    """Refuse to save what no reader takes: nothing but plain values and tensors is read from a checkpoint."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    try:
        check_object(buffer.getvalue(), name)
    except ValueError as error:
        raise TypeError(f"{name} must be plain values and tensors ({error.__cause__})") from error


def _files_of_rank(folder: Path, rank: int) -> Iterable[Path]:
    """Yield the files that this rank wrote; rank 0 also wrote those that belong to no rank.

    Example: __0_0.distcp, __1_0.distcp, common.pt -> the first and the last for rank 0, the other for rank 1.
    """
    for path in sorted(folder.iterdir()):
        match = _SHARD_FILE.fullmatch(path.name)
        if rank == (int(match[1]) if match else 0):
            yield path

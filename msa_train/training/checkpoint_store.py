"""Checkpoint folders on disk: published whole or not at all, checked before use. Standard library only.

run_dir/checkpoints/
    step_00000100/              published: Megatron's files and
        meta.json                   step, data position, model, layout
        manifest.json               size and CRC-32 of every other file
    .step_00000200.partial/     being written, or left by a crash
    latest -> step_00000100     moved when another one is published

CRC-32 because its enemy is a disk or a crash, and it is several times faster than any digest of hashlib. It
is no signature: against a forger, nothing in a checkpoint is executed, see checkpoint_pickles.py. The form of
manifest.json stays as it is, whatever meta.json's format_version becomes.
"""

import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any

import msa_train
from msa_train.config import AttentionKind, RunConfig
from msa_train.files import sync
from msa_train.model.checkpoint_pickles import METADATA_NAME, metadata_places, objects_damage
from msa_train.training.checkpoint_files import (
    BACKEND_NAME,
    MANIFEST_NAME,
    META_NAME,
    backend_damage,
    checksum_damage,
    file_words,
    listed_damage,
    places_damage,
    read_manifest,
    read_meta,
)
from msa_train.training.checkpoint_meta import FORMAT_VERSION, meta_damage
from msa_train.training.generation import check_generation
from msa_train.training.resume_rules import check_index_moments, schedule_notes
from msa_train.training.stage_record import check_recorded_stages

LATEST_NAME = "latest"
# meta.json's "content" of a checkpoint without optimizer; absent where there is everything
WEIGHTS_CONTENT = "weights"
FULL_CHECK_BYTES = 8 * 2**30
_PUBLISHED = re.compile(r"step_(\d{8,})")
_NAMED_DAMAGED = 4

# Neither shapes nor the meaning of the weights
_NOT_OF_THE_MODEL = {
    "model.name",
    "model.init_std",
    "model.embedding_init_std",
    "model.embedding_shared_std",
    "model.router_bias_update_rate",
    "attention.kl_weight",
    "attention.kl_temperature",
    "attention.kernel",
}
# What a long-context extension changes when it starts from another run's checkpoint
_CHANGED_BY_EXTENSION = {
    "model.rope_theta",
    "attention.block_size",
    "attention.topk",
    "attention.local_blocks",
    "attention.window",
    "attention.window_sink",
}
# What a new run that takes weights alone may change besides: index branches come and go with their layers
_CHANGED_WITH_WEIGHTS = {"model.layer_attention"}


@dataclass(kw_only=True, slots=True)
class Found:
    """A checkpoint to start from."""

    path: Path
    step: int
    meta: dict[str, Any]
    own: bool
    "it is in run_dir, so the run goes on; otherwise it is where checkpoint.load pointed"
    weights_only: bool
    "the run takes the model alone and begins at step 0"
    messages: list[str]
    "for the user: what is skipped and why; empty where there is nothing remarkable"


class CheckpointStore:
    """The checkpoints of one run. Writing (`begin`, `publish`, `abandon`, `prune`) is for rank 0."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir).expanduser() / "checkpoints"
        self._last_published: int | None = None
        self._left_over: set[str] = set()

    def path(self, step: int) -> Path:
        """Folder of a published step."""
        return self.folder / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """Folder of a step that is being written."""
        return self.folder / f".step_{step:08d}.partial"

    def steps(self) -> list[int]:
        """Published steps, ascending, damaged ones included."""
        if not self.folder.is_dir():
            return []
        # something else of that name is a checkpoint that was damaged
        matches = [_PUBLISHED.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def clear(self) -> list[str]:
        """Make the folder of all checkpoints, and remove what earlier crashes left in it.

        Another process may be removing the same, and some of it may be impossible to remove.

        Returns:
            A line about each leftover that stays, once.
        """
        check_generation(self.folder.parent)
        self.folder.mkdir(parents=True, exist_ok=True)
        notes = [self._discard(leftover) for leftover in self.folder.glob(".step_*")]
        return [note for note in notes if note]

    def check_space(self, num_bytes: int) -> None:
        """Refuse to begin what cannot be finished.

        Raises:
            OSError: one line with what is needed, what there is, and which checkpoint stays.
        """
        free = free_bytes(self.folder)
        if free >= num_bytes:
            return
        saved = self.steps()
        kept = f"the checkpoint of step {max(saved)} stays" if saved else "there is no checkpoint yet"
        raise OSError(
            f"it needs {num_bytes / 1e9:.3g} GB and {self.folder} has {free / 1e9:.3g} GB free, {kept}; "
            "free some space, or lower checkpoint.keep_last"
        )

    def begin(self, step: int) -> Path:
        """Make the folder to write into, after removing what earlier crashes left."""
        self.clear()
        return self.make_partial(step)

    def make_partial(self, step: int) -> Path:
        """Make the folder to write into; what could not be removed under its name is moved out of its way."""
        partial = self.partial(step)
        if os.path.lexists(partial):
            hidden = self._hidden(partial)
            partial.rename(hidden)
            # told by `clear` under its first name
            self._left_over.add(hidden.name)
        partial.mkdir()
        return partial

    def publish(self, step: int) -> Path:
        """Bring the written folder to the disk and make it visible in one rename."""
        partial, target = self.partial(step), self.path(step)
        for name in (META_NAME, MANIFEST_NAME):
            assert (partial / name).is_file(), f"{name} must be written before step {step} is published"
        for path in (*partial.rglob("*"), partial):
            sync(path)
        check_generation(self.folder.parent)
        # Only a run that went back behind a damaged checkpoint comes to the same step again.
        replaced = self._hidden(target)
        if os.path.lexists(target):
            target.rename(replaced)
        partial.rename(target)
        sync(self.folder)
        self._discard(replaced)
        self._last_published = step
        self._point_latest(target)
        return target

    def _point_latest(self, target: Path) -> None:
        """`latest` leads to a finished checkpoint at every moment; there is none where links are unknown."""
        name = f".{LATEST_NAME}.{secrets.token_hex(8)}.partial"
        partial, link = self.folder / name, self.folder / LATEST_NAME
        try:
            partial.symlink_to(target.name)
            self._take_away_copy(link)
            partial.replace(link)
        except OSError:
            partial.unlink(missing_ok=True)

    def _take_away_copy(self, link: Path) -> None:
        """A tool that follows links has made a folder of `latest`: a checkpoint again, or one too many."""
        if link.is_symlink() or not link.is_dir():
            return
        hidden = self._hidden(link)
        link.rename(hidden)
        try:
            own = self.path(read_meta(hidden)["step"])
        except (OSError, ValueError, KeyError, TypeError):
            own = None
        if own is not None and not os.path.lexists(own) and structure_damage(hidden) is None:
            hidden.rename(own)
        else:
            self._discard(hidden)

    def _hidden(self, path: Path) -> Path:
        """A name for what is to be removed, which nobody else has."""
        name = path.name.strip(".").removeprefix("step_")
        return self.folder / f".step_{name}.{secrets.token_hex(8)}.removed"

    def _discard(self, path: Path) -> str:
        """Remove a folder, or a link and not what it leads to; returns why it stays, once, if it does."""
        try:
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            else:
                # as far as possible, whoever else removes the same; then again, for the reason
                shutil.rmtree(path, ignore_errors=True)
                if path.exists():
                    shutil.rmtree(path)
        except FileNotFoundError:
            return ""
        except OSError as error:
            if path.name not in self._left_over:
                self._left_over.add(path.name)
                return f"{path} is left over and could not be removed ({error.strerror}); remove it by hand"
        return ""

    def remove_after(self, step: int) -> list[int]:
        """Remove published checkpoints of later steps, newest first: the run has gone back to this one."""
        removed = [later for later in reversed(self.steps()) if later > step]
        self._point_latest(self.path(step))
        for later in removed:
            self._remove(later)
        self._last_published = step
        return removed

    def _remove(self, step: int) -> None:
        check_generation(self.folder.parent)
        # out of sight first: a removal that is cut short must not look like a damaged checkpoint
        hidden = self._hidden(self.path(step))
        try:
            self.path(step).rename(hidden)
        except FileNotFoundError:
            # another process was faster
            return
        self._discard(hidden)

    def abandon(self, step: int) -> None:
        """Remove what was written of a step that will not be published, as far as possible."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def prune(self, keep_last: int, keep_every: int = 0, *, dry_run: bool = False) -> list[int]:
        """Remove published checkpoints except the last `keep_last` sound ones; 0 keeps all.

        One that was saved among bad steps, as a stopped run must, does not count: the run may go back.

        A checkpoint later than the one published last is damaged (else the run had started from it): it does
        not count, and stays until the run comes to its step.

        Args:
            keep_last: sound checkpoints that stay, however old.
            keep_every: so do those of steps that are multiples of it; 0: of none.
            dry_run: remove nothing.

        Returns:
            The removed steps, newest first.
        """
        removed: list[int] = []
        if keep_last == 0:
            return removed
        limit = math.inf if self._last_published is None else self._last_published
        num_kept = 0
        for step in reversed([step for step in self.steps() if step <= limit]):
            if num_kept < keep_last:
                num_kept += self._is_kept(step)
                continue
            if keep_every and step % keep_every == 0:
                continue
            if not dry_run:
                self._remove(step)
            removed.append(step)
        return removed

    def _is_kept(self, step: int) -> bool:
        """Whether a run can go on from it whatever comes: not from one saved among bad steps."""
        if self.verify(step, full=False) is not None:
            return False
        record = read_meta(self.path(step)).get("bad_steps", {})
        return not (isinstance(record, dict) and record.get("in_a_row"))

    def verify(self, step: int, *, full: bool = True) -> str | None:
        """None if the checkpoint is sound, else what is wrong with it.

        Args:
            step: a published step.
            full: read every file and compare checksums; otherwise only names, sizes, meta.json and
                manifest.json.
        """
        return verify_folder(self.path(step), full=full)


def find_checkpoint(
    config: RunConfig, *, full: bool, known_damaged: Mapping[Path, str] | None = None
) -> Found | None:
    """Newest sound checkpoint of run_dir or, where run_dir has none at all, of checkpoint.load.

    Args:
        config: the whole run.
        full: compare checksums of all files, not only their sizes.
        known_damaged: reason by folder, for checkpoints found to be damaged in another way.

    Raises:
        ValueError: one line, if checkpoints exist but none is sound, if the newest sound one is of another
            model or of a newer format, or if checkpoint.load leads nowhere.
    """
    return _find(config, math.inf if full else 0, known_damaged or {})


def check_resume(config: RunConfig) -> list[str]:
    """What to tell the user about the checkpoint that this run will start from, before any worker starts.

    Checksums are compared up to FULL_CHECK_BYTES per checkpoint; above that only names and sizes.

    Raises:
        ValueError: as `find_checkpoint`.
    """
    found = find_to_resume(config)
    return found.messages if found else []


def find_to_resume(config: RunConfig) -> Found | None:
    """The checkpoint that this run will start from, checked as far as `check_resume` does.

    Raises:
        ValueError: as `find_checkpoint`.
    """
    return _find(config, FULL_CHECK_BYTES, {})


def fingerprint(config: RunConfig) -> dict[str, object]:
    """Fields that decide shapes and meaning of the weights, e.g. {"model.num_heads": 4, ...}; plain JSON."""
    result: dict[str, object] = {}
    for section, part in (("model", config.model), ("attention", config.attention)):
        for field in fields(part):
            value = getattr(part, field.name)
            result[f"{section}.{field.name}"] = value.value if isinstance(value, Enum) else value
    if AttentionKind.swa not in config.model.attention_kinds():
        # a window that no layer has may change
        result |= {"attention.window": None, "attention.window_sink": None}
    kinds = [(kind.value, len(list(run))) for kind, run in groupby(config.model.attention_kinds())]
    result["model.layer_attention"] = ",".join(f"{kind}*{count}" for kind, count in kinds)
    return {key: value for key, value in result.items() if key not in _NOT_OF_THE_MODEL}


def verify_folder(folder: Path, *, full: bool) -> str | None:
    """As CheckpointStore.verify, for any checkpoint folder."""
    reason = structure_damage(folder)
    if reason is None and full:
        reason = stored_damage(folder) or _first_checksum_damage(folder)
    return reason


def structure_damage(folder: Path) -> str | None:
    """What is wrong with the names and sizes of the files, with meta.json or with manifest.json."""
    if not folder.is_dir():
        return f"{folder.name}: is no folder"
    try:
        files = read_manifest(folder)
        reason = listed_damage(folder, files) or checksum_damage(folder, META_NAME, files[META_NAME]["crc32"])
        reason = reason or meta_damage(read_meta(folder), _step_of(folder))
        if reason is None and BACKEND_NAME in files:
            reason = backend_damage(folder)
        if reason is None and METADATA_NAME in files:
            reason = places_damage(metadata_places(folder), files)
        return reason
    except FileNotFoundError as error:
        name = Path(error.filename).name
        hint = "; some tools leave out names with a dot when they copy" if name == METADATA_NAME else ""
        return f"{file_words(name)}: missing{hint}"
    except OSError as error:
        return f"{file_words(Path(error.filename).name)}: {error.strerror}"
    except ValueError as error:
        return str(error)


def stored_damage(folder: Path) -> str | None:
    """What is wrong with stored objects, of a folder whose structure is sound: a stranger's could be code."""
    return objects_damage(folder) if METADATA_NAME in read_manifest(folder) else None


def free_bytes(path: Path) -> int:
    """Free space on the disk where `path` is or would be."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _find(config: RunConfig, full_check_bytes: float, known_damaged: Mapping[Path, str]) -> Found | None:
    store = CheckpointStore(config.run_dir)
    own_folders = [store.path(step) for step in reversed(store.steps())]
    if own_folders:
        return _newest_sound(own_folders, config, full_check_bytes, known_damaged, own=True)
    if not config.checkpoint.load:
        return None
    return _newest_sound(_load_folders(config), config, full_check_bytes, known_damaged, own=False)


def _load_folders(config: RunConfig) -> list[Path]:
    """Checkpoint folders behind checkpoint.load, newest first."""
    load = Path(config.checkpoint.load).expanduser()
    if any((load / name).exists() for name in (META_NAME, MANIFEST_NAME)):
        return [load]
    store = CheckpointStore(load.parent if load.name == "checkpoints" else load)
    folders = [store.path(step) for step in reversed(store.steps())]
    if not folders:
        state = "has no checkpoint" if load.exists() else "does not exist"
        raise ValueError(
            f"checkpoint.load={config.checkpoint.load}: {state}; use the run_dir of a run that has saved, "
            "one of its folders checkpoints/step_*, or checkpoint.load= to start from new weights"
        )
    return folders


def _newest_sound(
    folders: list[Path],
    config: RunConfig,
    full_check_bytes: float,
    known_damaged: Mapping[Path, str],
    *,
    own: bool,
) -> Found:
    damaged: list[tuple[Path, str]] = []
    for folder in folders:
        reason = known_damaged.get(folder) or structure_damage(folder)
        if reason is None:
            # before the checksums, which take long
            notes = _check_usable(read_meta(folder), folder, config, own=own)
            size = sum(entry["size"] for entry in read_manifest(folder).values())
            reason = stored_damage(folder)
            if reason is None and size <= full_check_bytes:
                reason = _first_checksum_damage(folder)
            if reason is None:
                return _found(folder, damaged, notes, config, own=own)
        damaged.append((folder, reason))
    setting, fix = _setting_and_fix(config, own=own)
    reasons = [f"{folder.name}: {reason}" for folder, reason in damaged[:_NAMED_DAMAGED]]
    if len(damaged) > _NAMED_DAMAGED:
        reasons.append(f"and {len(damaged) - _NAMED_DAMAGED} more")
    remove = f"remove {damaged[0][0].parent} to start anew, or " if own else ""
    raise ValueError(f"{setting}: every checkpoint is damaged ({'; '.join(reasons)}); {remove}use {fix}")


def _found(
    folder: Path, damaged: list[tuple[Path, str]], notes: list[str], config: RunConfig, *, own: bool
) -> Found:
    meta = read_meta(folder)
    step = meta["step"]
    messages = [f"checkpoint {_short(path)} is damaged ({reason}) and is skipped" for path, reason in damaged]
    if messages:
        messages[-1] += f"; going on from step {step}"
    return Found(
        path=folder,
        step=step,
        meta=meta,
        own=own,
        weights_only=not own and _weights_only(meta, config),
        messages=messages + notes,
    )


def _weights_only(meta: dict[str, Any], config: RunConfig) -> bool:
    """Whether only the model is taken from another run's checkpoint: asked for, or there is nothing else."""
    return config.checkpoint.load_weights_only or meta.get("content") == WEIGHTS_CONTENT


def _check_usable(meta: dict[str, Any], folder: Path, config: RunConfig, *, own: bool) -> list[str]:
    """Refuse newer formats and other models; returns what the user should know."""
    setting, fix = _setting_and_fix(config, own=own)
    if meta["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{setting}: checkpoint {_short(folder)} has format {meta['format_version']}, written by "
            f"msa-train {meta.get('msa_train_version', 'unknown')}; this is {msa_train.__version__} and "
            f"knows formats up to {FORMAT_VERSION}; upgrade msa-train, or use {fix}"
        )
    ours, theirs, notes = fingerprint(config), meta["fingerprint"], []
    may_change = set() if own else set(_CHANGED_BY_EXTENSION)
    if not own and _weights_only(meta, config):
        may_change |= _CHANGED_WITH_WEIGHTS
        if AttentionKind.msa.value not in str(theirs.get("model.layer_attention")):
            may_change.add("attention.index_head_dim")
    for key in dict.fromkeys([*ours, *theirs]):
        # a field that is younger than the checkpoint had no say in it
        if key not in theirs or ours.get(key) == theirs[key]:
            continue
        if key not in ours:
            raise ValueError(
                f"{setting}: checkpoint {_short(folder)} has {key}={theirs[key]}, which msa-train "
                f"{msa_train.__version__} does not know; upgrade msa-train, or use {fix}"
            )
        if key not in may_change:
            raise ValueError(
                f"{key}={ours[key]}: checkpoint {folder} is of another model, with {key}={theirs[key]}; "
                f"set {key}={theirs[key]}, or use {fix}"
            )
        notes.append(f"{key}={ours[key]}: the checkpoint was trained with {theirs[key]}")
    _check_optimizer(meta, folder, config, own=own)
    _check_data_position(meta, folder, config, own=own)
    if own:
        check_recorded_stages(meta, config)
    if own or not _weights_only(meta, config):
        check_index_moments(folder, config)
        notes += schedule_notes(meta, config)
    return notes


def _check_optimizer(meta: dict[str, Any], folder: Path, config: RunConfig, *, own: bool) -> None:
    """The moments of one algorithm mean nothing to another."""
    ours, theirs = config.optim.algorithm.value, meta.get("optimizer")
    if theirs in (None, ours) or (not own and _weights_only(meta, config)):
        return
    raise ValueError(
        f"optim.algorithm={ours}: checkpoint {_short(folder)} has the state of {theirs}; use "
        f"optim.algorithm={theirs}, or another run_dir with checkpoint.load={config.run_dir} and "
        "checkpoint.load_weights_only=true"
    )


def _check_data_position(meta: dict[str, Any], folder: Path, config: RunConfig, *, own: bool) -> None:
    """The next pack is found from the step, so a run keeps its batch size: else packs repeat or are lost."""
    batch, consumed, step = config.train.global_batch_size, meta["consumed_samples"], meta["step"]
    if own and consumed != step * batch:
        raise ValueError(
            f"train.global_batch_size={batch}: checkpoint {_short(folder)} has used {consumed} packs, "
            f"{consumed / step:g} per step, and one run counts its packs by one size, also with "
            "checkpoint.accept_other_data; use "
            f"train.global_batch_size={consumed / step:g}, or another run_dir with "
            f"checkpoint.load={config.run_dir} and checkpoint.accept_other_data=true"
        )


def _setting_and_fix(config: RunConfig, *, own: bool) -> tuple[str, str]:
    if own:
        return f"run_dir={config.run_dir}", "another run_dir"
    return f"checkpoint.load={config.checkpoint.load}", "another checkpoint.load"


def _first_checksum_damage(folder: Path) -> str | None:
    entries = sorted(read_manifest(folder).items())
    reasons = (checksum_damage(folder, name, entry["crc32"]) for name, entry in entries)
    return next((reason for reason in reasons if reason), None)


def _step_of(folder: Path) -> int | None:
    match = _PUBLISHED.fullmatch(folder.name)
    return int(match[1]) if match else None


def _short(folder: Path) -> str:
    """step_00000200 -> step_200; other names as they are."""
    step = _step_of(folder)
    return folder.name if step is None else f"step_{step}"

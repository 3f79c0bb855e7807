"""Find the checkpoint that a run starts from: the newest sound one of its own, or of checkpoint.load.

Candidates are looked at from the newest on, each in the order of costs: names and sizes, then whether this
run can use it, then stored objects, then checksums. The first sound one is taken. One of another model is an
error and not passed over: a run that silently began anew, or from something older, would be worse than none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa_train.checkpoint.compatibility import (
    check_usable,
    setting_and_fix,
    short_name,
    takes_weights_only,
)
from msa_train.checkpoint.manifest import (
    MANIFEST_NAME,
    first_checksum_damage,
    read_manifest,
    read_meta,
    stored_damage,
    structure_damage,
)
from msa_train.checkpoint.meta import META_NAME
from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import RunConfig

# up to this size one process compares all checksums before workers start; above, they do it together
FULL_CHECK_BYTES = 8 * 2**30


# damaged checkpoints that an error names, of maybe hundreds
_NAMED_DAMAGED = 4


@dataclass(kw_only=True, slots=True)
class ResumePoint:
    """Hold a checkpoint to start from."""

    path: Path
    "its folder"
    step: int
    "updates made when it was saved"
    meta: dict[str, Any]
    "content of meta.json"
    own: bool
    "it is in run_dir, so the run goes on; otherwise it is where checkpoint.load pointed"
    weights_only: bool
    "the run takes the model alone and begins at step 0"
    messages: list[str]
    "for the user: what is skipped and why; empty where there is nothing remarkable"


def select_checkpoint(
    config: RunConfig, *, full: bool, known_damaged: Mapping[Path, str] | None = None
) -> ResumePoint | None:
    """Select the newest sound checkpoint of run_dir or, where run_dir has none at all, of checkpoint.load.

    Example: steps 100, 200 and 300, of which 300 is damaged -> 200, with a message about 300.

    Args:
        config: the whole run.
        full: compare checksums of all files, not only their sizes.
        known_damaged: reason by folder, of checkpoints that another check has found damaged.

    Returns:
        None if neither is there: the run begins with new weights.

    Raises:
        ValueError: one line, if checkpoints exist but none is sound, if the newest sound one is of another
            model or of a newer format, or if checkpoint.load leads nowhere.
    """
    return _find(config, math.inf if full else 0, known_damaged or {})


def find_to_resume(config: RunConfig) -> ResumePoint | None:
    """Find the checkpoint that this run will start from, before any worker starts.

    Checksums are compared up to FULL_CHECK_BYTES per checkpoint; above that only names and sizes.

    Raises:
        ValueError: as `select_checkpoint`.
    """
    return _find(config, FULL_CHECK_BYTES, {})


def _find(
    config: RunConfig, full_check_bytes: float, known_damaged: Mapping[Path, str]
) -> ResumePoint | None:
    """Look in run_dir, then behind checkpoint.load; full_check_bytes: compare checksums up to this size."""
    store = CheckpointStore(config.run_dir)
    own_folders = [store.path(step) for step in reversed(store.steps())]
    # Checkpoints of its own that are all damaged are an error, and no reason to start from checkpoint.load:
    # that would throw away the run.
    if own_folders:
        return _newest_sound(own_folders, config, full_check_bytes, known_damaged, own=True)
    if not config.checkpoint.load:
        return None
    return _newest_sound(_load_folders(config), config, full_check_bytes, known_damaged, own=False)


def _load_folders(config: RunConfig) -> list[Path]:
    """List the checkpoint folders behind checkpoint.load, newest first; it may be one itself."""
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
) -> ResumePoint:
    """Take the first sound one of `folders`, and say why those before it are not.

    Raises:
        ValueError: one line, if none is sound or the first one that is cannot be used.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in folders:
        reason = known_damaged.get(folder) or structure_damage(folder)
        if reason is None:
            # before the checksums, which take long
            notes = check_usable(read_meta(folder), folder, config, own=own)
            size = sum(entry["size"] for entry in read_manifest(folder).values())
            reason = stored_damage(folder)
            if reason is None and size <= full_check_bytes:
                reason = first_checksum_damage(folder)
            if reason is None:
                return _found(folder, damaged, notes, config, own=own)
        damaged.append((folder, reason))
    setting, fix = setting_and_fix(config, own=own)
    reasons = [f"{folder.name}: {reason}" for folder, reason in damaged[:_NAMED_DAMAGED]]
    if len(damaged) > _NAMED_DAMAGED:
        reasons.append(f"and {len(damaged) - _NAMED_DAMAGED} more")
    remove = f"remove {damaged[0][0].parent} to start anew, or " if own else ""
    raise ValueError(f"{setting}: every checkpoint is damaged ({'; '.join(reasons)}); {remove}use {fix}")


def _found(
    folder: Path, damaged: list[tuple[Path, str]], notes: list[str], config: RunConfig, *, own: bool
) -> ResumePoint:
    """Make the ResumePoint of a sound folder: one line for each damaged one, then the notes."""
    meta = read_meta(folder)
    step = meta["step"]
    messages = [
        f"checkpoint {short_name(path)} is damaged ({reason}) and is skipped" for path, reason in damaged
    ]
    if messages:
        messages[-1] += f"; going on from step {step}"
    return ResumePoint(
        path=folder,
        step=step,
        meta=meta,
        own=own,
        weights_only=not own and takes_weights_only(meta, config),
        messages=messages + notes,
    )

"""Saving and loading by all ranks together, with Megatron's dist-checkpointing.

A failure of one rank is raised on every rank with its cause, and nothing is published. That takes care about
who waits where: between two exchanges no rank may leave alone.
"""

import io
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

import msa_train
from msa_train.config import RunConfig
from msa_train.model.index_branch import is_index_parameter
from msa_train.training.checkpoint_store import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    META_NAME,
    CheckpointStore,
    Found,
    checksum_damage,
    file_entry,
    find_checkpoint,
    read_manifest,
    read_meta,
    structure_damage,
    write_json,
)
from msa_train.training.save_strategy import build_save_strategy

T = TypeVar("T")
RNG_KEY = "rng_state"
# Keys of what is not the model begin so.
_OTHER_STATE = (RNG_KEY, "optimizer")
_SHARD_FILE = re.compile(r"__(\d+)_\d+\.distcp")
_NAMED_KEYS = 5


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or loaded. Raised on all ranks with the same text."""


def save_checkpoint(
    store: CheckpointStore,
    *,
    step: int,
    sharded_state: dict[str, Any],
    common: dict[str, Any],
    meta: dict[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write and publish one checkpoint. All ranks call it; it returns when the checkpoint is visible.

    The state of this rank's random number generators is stored besides what is given.

    Args:
        store: of the run, on a disk that all ranks share.
        step: optimizer steps made.
        sharded_state: Megatron ShardedTensors, ShardedObjects and factories, nested; plain values among them
            are treated as `common`. Factories are replaced in place by what they build.
        common: plain data, the same on all ranks: numbers, text, tensors, lists and dicts of them.
        meta: `consumed_samples`, `fingerprint` and `layout`, for meta.json.
        group: all ranks, for the small exchanges; gloo spares the GPUs. The default group if None.

    Raises:
        CheckpointError: naming the rank and the cause; no folder is published then.
    """
    rank, state = dist.get_rank(), {**common, **sharded_state}
    assert len(state) == len(common) + len(sharded_state), "common and sharded_state share a key"
    assert {"consumed_samples", "fingerprint"} <= set(meta), f"meta lacks keys, it has {sorted(meta)}"
    state[RNG_KEY] = _rng_shard(rng_state())

    def prepare() -> None:
        if rank == 0:
            store.begin(step)
        _, plain = save_preprocess(state, validate_access_integrity=False)
        if rank == 0:
            _check_readable(plain)

    def write() -> dict[str, Any]:
        _write_shards(state, store.partial(step), group)
        return {path.name: file_entry(path) for path in _files_of_rank(store.partial(step), rank)}

    def publish(files: dict[str, Any]) -> None:
        folder = store.partial(step)
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
        store.publish(step)

    try:
        _together(prepare, group)
        entries = _together(write, group)
        files = {name: entry for part in entries for name, entry in part.items()}
        _together(lambda: publish(files) if rank == 0 else None, group)
    except CheckpointError as error:
        if rank == 0:
            store.abandon(step)
        raise CheckpointError(f"checkpoint of step {step} could not be saved: {error}") from error


def load_checkpoint(
    path: str | Path, sharded_state_template: dict[str, Any], group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Read one checkpoint, whatever number of ranks and layout wrote it. All ranks call it.

    Args:
        path: a checkpoint folder.
        sharded_state_template: as given to save_checkpoint, in this run's layout; its tensors are read into.
        group: see save_checkpoint.

    Returns:
        What save_checkpoint was given: the template with its data, and the entries of `common`. RNG_KEY holds
        this rank's generators, for set_rng_state; it is absent if another number of ranks saved.

    Raises:
        CheckpointError: if the checkpoint lacks keys of the template or has others, or cannot be read.
    """
    meta, template = read_meta(Path(path)), dict(sharded_state_template)
    if meta.get("world_size") == dist.get_world_size():
        template[RNG_KEY] = _rng_shard(None)

    state: dict[str, Any] = {}

    def read() -> set[str]:
        loaded, complaints = _read_shards(template, path)
        state.update(loaded)
        return complaints

    try:
        complaints = sorted(set().union(*_together(read, group)))
    except CheckpointError as error:
        # newer versions read the files of older ones, not the other way round
        writer, hint = meta.get("megatron_core_version", megatron_version), ""
        if writer != megatron_version:
            hint = f" (megatron-core {writer} wrote it, this is {megatron_version})"
        raise CheckpointError(f"checkpoint {path} could not be loaded: {error}{hint}") from error
    if complaints:
        raise CheckpointError(f"checkpoint {path} is not of this model: it {'; it '.join(complaints)}")
    return state


def load_weights(
    path: str | Path, model_template: dict[str, Any], group: dist.ProcessGroup | None = None
) -> tuple[dict[str, Any], set[str]]:
    """Read the model of one checkpoint and nothing else. All ranks call it.

    Index branches may be missing on either side: a model with full attention has none.

    Args:
        path: a checkpoint folder.
        model_template: this rank's part of the model, as sharded tensors.
        group: see save_checkpoint.

    Returns:
        The template with its data, without the entries that the checkpoint lacks, and the keys of those.

    Raises:
        CheckpointError: if other parts of the model are missing or left over, or the files cannot be read.
    """
    state: dict[str, Any] = {}

    def read() -> tuple[set[str], set[str]]:
        loaded, not_asked_for, lacking = _read({"model": model_template}, path)
        state.update(loaded)
        return lacking, {key for key in not_asked_for if not key.startswith(_OTHER_STATE)}

    try:
        found = _together(read, group)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path} could not be loaded: {error}") from error
    lacking, left_over = (set().union(*(part[i] for part in found)) for i in (0, 1))
    texts = [
        _keys_text("lacks", {key for key in lacking if not is_index_parameter(key)}),
        _keys_text("also has", {key for key in left_over if not is_index_parameter(key)}),
    ]
    if any(texts):
        complaints = "; it ".join(text for text in texts if text)
        raise CheckpointError(f"checkpoint {path} is not of this model: it {complaints}")
    return state["model"], lacking


def verify_distributed(path: str | Path, group: dist.ProcessGroup | None = None) -> str | None:
    """Compare the checksums of all files, dealt over the ranks.

    Returns:
        On all ranks the same: None if the checkpoint is sound, else what is wrong with it.
    """
    folder, rank = Path(path), dist.get_rank()
    reason = _together(lambda: structure_damage(folder) if rank == 0 else None, group)[0]
    if reason is not None:
        return reason

    def check() -> list[tuple[str, str]]:
        by_size = sorted(read_manifest(folder).items(), key=lambda item: (-item[1]["size"], item[0]))
        mine = by_size[rank :: dist.get_world_size()]
        reasons = ((name, checksum_damage(folder, name, entry["crc32"])) for name, entry in mine)
        return [(name, reason) for name, reason in reasons if reason]

    found = sorted(item for part in _together(check, group) for item in part)
    return found[0][1] if found else None


def find_verified_checkpoint(config: RunConfig, group: dist.ProcessGroup | None = None) -> Found | None:
    """`find_checkpoint` with full checksums, the reading dealt over the ranks; all get the same answer.

    Raises:
        ValueError: as `find_checkpoint`, on all ranks.
    """
    known_damaged: dict[Path, str] = {}

    def find() -> Found | str | None:
        try:
            return find_checkpoint(config, full=False, known_damaged=known_damaged)
        except ValueError as error:
            return str(error)

    while True:
        found = _together(lambda: find() if dist.get_rank() == 0 else None, group)[0]
        if isinstance(found, str):
            raise ValueError(found)
        reason = None if found is None else verify_distributed(found.path, group)
        if found is None or reason is None:
            return found
        known_damaged[found.path] = reason


def rng_state() -> dict[str, Any]:
    """State of this process's random number generators: Python, NumPy, torch, and CUDA's current device."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": {
            "kind": str(kind),
            "keys": torch.tensor(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Bring the generators back to what `rng_state` saw."""
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    keys = numpy_state["keys"].numpy().astype(np.uint32)
    np.random.set_state(
        (numpy_state["kind"], keys, numpy_state["position"], numpy_state["has_gauss"], numpy_state["cached"])
    )
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _together(work: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Do `work` on every rank and exchange the results, by rank; a failure anywhere is raised everywhere."""
    result, text, cause = None, "", None
    try:
        result = work()
    except CheckpointError as error:
        # all ranks have it already
        cause, text = error, str(error)
    except Exception as error:
        cause, text = error, f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (text, result), group=group)
    failures = list(dict.fromkeys(text for text, _ in outcomes if text))
    if failures:
        raise CheckpointError("; ".join(failures[:2])) from cause
    return [result for _, result in outcomes]


def _write_shards(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Megatron's save, arranged so that a rank that fails alone still meets the others where they wait."""
    strategy = build_save_strategy(gate=lambda: _together(lambda: None, group))
    try:
        dist_checkpointing.save(state, str(folder), strategy)
    except CheckpointException as error:
        raise CheckpointError(_first_failure(error)) from error
    except Exception as error:
        if not strategy.reached_gate:
            reason = error
            _together(lambda: _raise(reason), group)
        elif strategy.written:
            # rank 0 alone writes the last file of Megatron; the others are in its barrier
            dist.barrier()
        raise


def _read_shards(template: dict[str, Any], path: str | Path) -> tuple[dict[str, Any], set[str]]:
    """State, and what this rank has to say about the keys."""
    state, not_asked_for, lacking = _read(template, path)
    complaints = [_keys_text("lacks", lacking), _keys_text("also has", not_asked_for - {RNG_KEY})]
    return state, {text for text in complaints if text}


def _read(template: dict[str, Any], path: str | Path) -> tuple[dict[str, Any], set[str], set[str]]:
    """State, keys that were not asked for, keys that are lacking."""
    try:
        # Keys that one rank alone does not find must not make it leave alone, so they are only returned.
        loaded: Any = dist_checkpointing.load(template, str(path), strict=StrictHandling.RETURN_ALL)
    except CheckpointException as error:
        raise CheckpointError(_first_failure(error)) from error
    return loaded


def _raise(error: Exception) -> None:
    raise error


def _first_failure(error: CheckpointException) -> str:
    """The cause within what PyTorch raises on all ranks, e.g. "rank 1: OSError: No space left on device"."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _check_readable(plain: dict[str, Any]) -> None:
    """Megatron reads common data with weights_only; find out now, not when it is needed."""
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TypeError(f"common data {sorted(plain)} must be plain values and tensors ({reason})") from error


def _files_of_rank(folder: Path, rank: int) -> Iterable[Path]:
    """Files that this rank wrote; rank 0 also wrote those that belong to no rank."""
    for path in sorted(folder.iterdir()):
        match = _SHARD_FILE.fullmatch(path.name)
        if rank == (int(match[1]) if match else 0):
            yield path


def _rng_shard(state: dict[str, Any] | None) -> ShardedObject:
    return ShardedObject(RNG_KEY, state, (dist.get_world_size(),), (dist.get_rank(),))


def _keys_text(verb: str, keys: set[str]) -> str:
    """{"b", "a"} -> "lacks a, b"."""
    names = sorted(keys)
    more = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
    return f"{verb} {', '.join(names[:_NAMED_KEYS])}{more}" if names else ""

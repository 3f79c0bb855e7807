"""Find, verify and load checkpoints by all ranks together, with Megatron's dist-checkpointing.

    load_newest
        select_verified_checkpoint   rank 0 looks for candidates, all ranks compare the checksums
        load_checkpoint              each rank reads its part: all of the state
        load_weights                 or the model alone
        ... and again with the next older one, if numbers in it are not finite

A failure of one rank is raised on every rank with its cause. Between two exchanges no rank may leave alone:
Megatron's loading has collectives of its own, in which the others would wait for it until their timeout. So
what one rank misses is collected, exchanged, and judged by all alike.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from msa_train.checkpoint.all_ranks import CheckpointError, run_on_all_ranks
from msa_train.checkpoint.find import ResumePoint, select_checkpoint
from msa_train.checkpoint.manifest import (
    checksum_damage,
    read_manifest,
    read_meta,
    stored_damage,
    structure_damage,
)
from msa_train.checkpoint.torch_dist.finite_state import NotFiniteError, check_loaded
from msa_train.checkpoint.torch_dist.format_versions import match_format
from msa_train.checkpoint.torch_dist.reader import LoadStrategy, check_common, node_group, node_name
from msa_train.checkpoint.torch_dist.rng_state import RNG_KEY, rng_shard
from msa_train.checkpoint.torch_dist.writer import first_failure
from msa_train.config import RunConfig
from msa_train.model.attention.index_branch import is_index_parameter

# Keys of what is not the model begin so.
_OTHER_STATE = (RNG_KEY, "optimizer")
# keys that an error names; a wrong model has thousands
_NAMED_KEYS = 5


def load_checkpoint(
    path: str | Path, sharded_state_template: dict[str, Any], group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Read one checkpoint, whatever number of ranks and layout wrote it. All ranks call it.

    Each rank reads what its template asks for, 14 bytes per parameter (bf16 weights 2, fp32 weights and two
    moments 12); what several ranks of a node ask for is read by one of them, see `torch_dist/node_reads.py`.

    Args:
        path: a checkpoint folder.
        sharded_state_template: as given to CheckpointSaver.save, in this run's layout; read into.
        group: all ranks, for the small exchanges; the default group if None.

    Returns:
        What CheckpointSaver.save was given: the template with its data, and the entries of `common`. RNG_KEY
        holds this rank's generators, for set_rng_state; it is absent if another number of ranks saved.

    Raises:
        CheckpointError: if the checkpoint lacks keys of the template or has others, or cannot be read.
        NotFiniteError: if numbers in it are not finite.
    """
    meta, template = read_meta(Path(path)), dict(sharded_state_template)
    # generators belong to ranks: with another number of them there is no telling whose is whose
    if meta.get("world_size") == dist.get_world_size():
        template[RNG_KEY] = rng_shard(None)

    state: dict[str, Any] = {}

    def read() -> set[str]:
        expected = match_format(template, Path(path), meta["format_version"])
        loaded, complaints = _read_shards(expected, path, node)
        state.update(loaded)
        return complaints

    names = run_on_all_ranks(node_name, group)
    try:
        with node_group(names) as node:
            complaints = sorted(set().union(*run_on_all_ranks(read, group)))
    except CheckpointError as error:
        # newer versions read the files of older ones, not the other way round
        writer, hint = meta.get("megatron_core_version", megatron_version), ""
        if writer != megatron_version:
            hint = f" (megatron-core {writer} wrote it, this is {megatron_version})"
        raise CheckpointError(f"checkpoint {path} could not be loaded: {error}{hint}") from error
    if complaints:
        raise CheckpointError(f"checkpoint {path} is not of this model: it {'; it '.join(complaints)}")
    check_loaded(path, {key: value for key, value in state.items() if key != RNG_KEY}, group)
    return state


def load_weights(
    path: str | Path, model_template: dict[str, Any], group: dist.ProcessGroup | None = None
) -> tuple[dict[str, Any], set[str]]:
    """Read the model of one checkpoint and nothing else. All ranks call it.

    Index branches may be missing on either side: a model with full attention has none.

    Args:
        path: a checkpoint folder.
        model_template: this rank's part of the model, as sharded tensors.
        group: all ranks, for the small exchanges; the default group if None.

    Returns:
        The template with its data, without the entries that the checkpoint lacks, and the keys of those.

    Raises:
        CheckpointError: if other parts of the model are missing or left over, or the files cannot be read.
        NotFiniteError: if numbers in it are not finite.
    """
    state: dict[str, Any] = {}

    def read() -> tuple[set[str], set[str]]:
        loaded, not_asked_for, lacking = _read({"model": model_template}, path, node)
        state.update(loaded)
        return lacking, {key for key in not_asked_for if not key.startswith(_OTHER_STATE)}

    names = run_on_all_ranks(node_name, group)
    try:
        with node_group(names) as node:
            found = run_on_all_ranks(read, group)
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
    check_loaded(path, state["model"], group)
    return state["model"], lacking


def verify_distributed(path: str | Path, group: dist.ProcessGroup | None = None) -> str | None:
    """Compare the checksums of all files, dealt over the ranks by size, the largest first.

    Example: sizes 9, 7, 4, 2 on two ranks: rank 0 reads 9 and 4, rank 1 reads 7 and 2. At 256 ranks a save of
    256 ranks has about one file for each; no file is cut, so the largest one decides the time.

    Args:
        path: a checkpoint folder that all ranks see.
        group: all ranks, for the small exchanges; the default group if None.

    Returns:
        On all ranks the same: None if the checkpoint is sound, else what is wrong with it.
    """
    folder, rank = Path(path), dist.get_rank()

    def check_structure() -> str | None:
        return (structure_damage(folder) or stored_damage(folder)) if rank == 0 else None

    reason = run_on_all_ranks(check_structure, group)[0]
    if reason is not None:
        return reason

    def check() -> list[tuple[str, str]]:
        by_size = sorted(read_manifest(folder).items(), key=lambda item: (-item[1]["size"], item[0]))
        mine = by_size[rank :: dist.get_world_size()]
        reasons = ((name, checksum_damage(folder, name, entry["crc32"])) for name, entry in mine)
        return [(name, reason) for name, reason in reasons if reason]

    # the first one by name, whoever found it: all ranks say the same
    found = sorted(item for part in run_on_all_ranks(check, group) for item in part)
    return found[0][1] if found else None


def select_verified_checkpoint(
    config: RunConfig,
    group: dist.ProcessGroup | None = None,
    *,
    known_damaged: Mapping[Path, str] | None = None,
) -> ResumePoint | None:
    """Select a checkpoint as `select_checkpoint`, with full checksums dealt over the ranks.

    Rank 0 alone lists folders, and its answer is sent around: a file system that shows a new folder to some
    ranks first must not make them start from different steps.

    Args:
        config: the whole run.
        group: all ranks, for the small exchanges; the default group if None.
        known_damaged: reason by folder, of checkpoints that must not be used.

    Returns:
        On all ranks the same: the checkpoint, None where there is none.

    Raises:
        ValueError: as `select_checkpoint`, on all ranks.
    """
    known_damaged = dict(known_damaged or {})

    def find() -> ResumePoint | str | None:
        try:
            return select_checkpoint(config, full=False, known_damaged=known_damaged)
        except ValueError as error:
            # as a result, since it is the user's to mend and no failure of a rank
            return str(error)

    # each turn takes one damaged checkpoint out, so it ends
    while True:
        found = run_on_all_ranks(lambda: find() if dist.get_rank() == 0 else None, group)[0]
        if isinstance(found, str):
            raise ValueError(found)
        reason = None if found is None else verify_distributed(found.path, group)
        if found is None or reason is None:
            return found
        known_damaged[found.path] = reason


def load_newest(
    config: RunConfig, load: Callable[[ResumePoint], None], *, known_damaged: Mapping[Path, str] | None = None
) -> ResumePoint | None:
    """Load the newest checkpoint that is sound and finite. All ranks call it.

    Args:
        config: the whole run.
        load: reads one and raises NotFiniteError on all ranks if it cannot be used.
        known_damaged: reason by folder, of checkpoints that must not be used.

    Returns:
        What was loaded, None where there is no checkpoint.

    Raises:
        ValueError: as `select_checkpoint`, on all ranks.
    """
    passed_over = dict(known_damaged or {})
    while (found := select_verified_checkpoint(config, known_damaged=passed_over)) is not None:
        try:
            load(found)
            return found
        except NotFiniteError as error:
            passed_over[found.path] = error.reason
    return None


def _read_shards(
    template: dict[str, Any], path: str | Path, node: dist.ProcessGroup | None
) -> tuple[dict[str, Any], set[str]]:
    """Read this rank's part: state, and what this rank has to say about the keys."""
    state, not_asked_for, lacking = _read(template, path, node)
    complaints = [_keys_text("lacks", lacking), _keys_text("also has", not_asked_for - {RNG_KEY})]
    return state, {text for text in complaints if text}


def _read(
    template: dict[str, Any], path: str | Path, node: dist.ProcessGroup | None
) -> tuple[dict[str, Any], set[str], set[str]]:
    """Read this rank's part: state, keys that were not asked for, keys that are lacking."""
    strategy = LoadStrategy(node)
    try:
        check_common(Path(path))
        # Keys that one rank alone does not find must not make it leave alone, so they are only returned.
        loaded: Any = dist_checkpointing.load(
            template, str(path), sharded_strategy=strategy, strict=StrictHandling.RETURN_ALL
        )
    except CheckpointException as error:
        # torch's, which is no Exception
        strategy.serve_others()
        raise CheckpointError(first_failure(error)) from error
    except Exception:
        # newer Megatron-core lets a rank fail alone here
        strategy.serve_others()
        raise
    return loaded


def _keys_text(verb: str, keys: set[str]) -> str:
    """Say something of keys: "lacks", {"b", "a"} -> "lacks a, b"."""
    names = sorted(keys)
    more = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
    return f"{verb} {', '.join(names[:_NAMED_KEYS])}{more}" if names else ""

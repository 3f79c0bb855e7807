"""Publish and read checkpoints of a model's weights and nothing else: what an import leaves for a training.

A folder as of any checkpoint (meta.json, manifest.json, Megatron's files), of step 0, without optimizer
state, random number generators and data position; meta.json says `"content": "weights"`. In bf16 that is 2
bytes per parameter instead of 14: 852 GB for m3.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from megatron.core import __version__ as megatron_version

import msa_train
from msa_train.checkpoint.compatibility import WEIGHTS_CONTENT, changed_by_stages, fingerprint
from msa_train.checkpoint.manifest import MANIFEST_NAME, file_entry, read_meta, structure_damage
from msa_train.checkpoint.meta import FORMAT_VERSION, META_NAME
from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import AttentionConfig, ModelConfig, RunConfig
from msa_train.config.rules.limits import COUNT, LIMITS, check_size
from msa_train.config.text import excerpt
from msa_train.runtime.atomic_files import write_json

# beyond it lie slips of the hand, and what is not finite
_LARGEST_NUMBER = 1e30


def publish_weights(
    run_dir: Path,
    model: ModelConfig,
    attention: AttentionConfig,
    write: Callable[[Path], dict[str, dict[str, Any]]],
    *,
    source: str,
) -> Path:
    """Write and publish a weights-only checkpoint; nothing is left behind where it fails.

    Args:
        run_dir: gets checkpoints/step_00000000.
        model, attention: shape of the model.
        write: fills a folder and returns size and checksum of each file by name.
        source: where the weights come from, for the reader of meta.json.

    Returns:
        The published folder.

    Raises:
        ValueError: if run_dir has checkpoints already.
    """
    store = CheckpointStore(run_dir)
    if store.steps():
        raise ValueError(f"{run_dir}: has checkpoints already; name another folder, or remove {store.folder}")
    # folders that are not there yet, so that a failure can take them away again
    made = [path for path in (run_dir, store.folder) if not path.exists()]
    made = [path for path in run_dir.parents if not path.exists()] + made
    folder = store.begin(0)
    try:
        files = write(folder)
        meta = {
            "format_version": FORMAT_VERSION,
            "content": WEIGHTS_CONTENT,
            "step": 0,
            "consumed_samples": 0,
            "msa_train_version": msa_train.__version__,
            "megatron_core_version": megatron_version,
            "fingerprint": fingerprint(RunConfig(model=model, attention=attention)),
            "source": source,
        }
        write_json(folder / META_NAME, meta)
        files = files | {META_NAME: file_entry(folder / META_NAME)}
        write_json(folder / MANIFEST_NAME, {"checksum": "crc32", "files": dict(sorted(files.items()))})
        return store.publish(0)
    except BaseException:
        store.abandon(0)
        for path in sorted(made, reverse=True):
            # not if something else is in it by now
            with suppress(OSError):
                path.rmdir()
        raise


def checkpoint_folder(path: Path) -> Path:
    """Find the checkpoint that a path means: itself, or the newest one of a run_dir.

    Raises:
        ValueError: one line, if there is none, or it is damaged.
    """
    folder = path
    if not (path / META_NAME).exists():
        store = CheckpointStore(path.parent if path.name == "checkpoints" else path)
        steps = store.steps()
        if not steps:
            state = "has no checkpoint" if path.exists() else "does not exist"
            raise ValueError(f"{path}: {state}; name a run_dir, or one of its folders checkpoints/step_*")
        folder = store.path(steps[-1])
    reason = structure_damage(folder)
    if reason is not None:
        raise ValueError(f"checkpoint {folder}: is damaged ({reason}); name another one")
    return folder


def shape_of(folder: Path) -> tuple[ModelConfig, AttentionConfig]:
    """Read the shape of the model in a checkpoint from its meta.json.

    Settings that are not part of a model's shape, as the initial scale of weights, have their defaults.

    Raises:
        ValueError: one line, if a newer msa-train wrote it, or its settings are of other kinds.
    """
    meta = read_meta(folder)
    if meta["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {folder}: has format {meta['format_version']}, this msa-train knows up to "
            f"{FORMAT_VERSION}; upgrade msa-train"
        )
    # the weights have the rotary embedding and top-k of the last stage that trained them
    values: dict[str, Any] = meta["fingerprint"] | changed_by_stages(meta)
    return _section(ModelConfig, "model.", values, folder), _section(
        AttentionConfig, "attention.", values, folder
    )


def trained_seq_len(folder: Path) -> int:
    """Return the tokens of the longest packs that a checkpoint was trained with; 0 where it does not say."""
    lengths = [stage.get("seq_len") for stage in read_meta(folder).get("stages", [])]
    return max((one for one in lengths if type(one) is int), default=0)


def _section(kind: type, prefix: str, values: dict[str, Any], folder: Path) -> Any:
    """Make one section of the configuration from the entries of the fingerprint with its prefix."""
    types = {field.name: field.type for field in fields(kind)}
    # None stands for a setting that has no effect on this model
    own = {name: value for name, value in values.items() if name.startswith(prefix) and value is not None}
    given = {name.removeprefix(prefix): value for name, value in own.items()}
    for name in given:
        if name not in types:
            raise ValueError(
                f"checkpoint {folder}: has {prefix}{name}={given[name]}, which msa-train "
                f"{msa_train.__version__} does not know; upgrade msa-train"
            )
        given[name] = _setting(f"{prefix}{name}", types[name], given[name], folder)
    return kind(**given)


def _setting(name: str, kind: Any, value: Any, folder: Path) -> Any:
    """Read one setting, which somebody may have written by hand.

    Raises:
        ValueError: one line, if it is of another kind than its setting, or absurdly large.
    """
    if issubclass(kind, Enum) and value in [choice.value for choice in kind]:
        return kind(value)
    if kind is float and type(value) in (int, float) and abs(value) < _LARGEST_NUMBER:
        return float(value)
    if kind is int and type(value) is int:
        check_size(name, value, LIMITS.get(name, COUNT))
        return value
    if kind is bool and type(value) is bool:
        return value
    if kind is str and isinstance(value, str) and value.isprintable():
        return value
    raise ValueError(
        f"checkpoint {folder}: is damaged ({META_NAME}: {name}={excerpt(str(value))}); name another one"
    )

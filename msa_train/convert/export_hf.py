"""Export a checkpoint of ours to a Hugging Face checkpoint, piece by piece: no tensor is ever held whole.

Cost: M3 has 426 billion parameters, 852 GB in bf16. They are read once and written once, in pieces of at most
16 MiB into files of at most 5 GB (more than 170 of them); at 1 GB/s either way that is about half an hour.
The table of its tensors has 16,000 to 23,000 spans and takes half a second; memory beside it does not grow
with the model.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msa_train.checkpoint.torch_dist.files import ShardedReader
from msa_train.config import AttentionConfig, ModelConfig
from msa_train.convert.config_fields import Family
from msa_train.convert.config_read import read_hf_config
from msa_train.convert.config_write import DEFAULT_MAX_POSITIONS, extend_hf_config, family_of, write_hf_config
from msa_train.convert.safetensors_files import (
    INDEX_NAME,
    NewTensor,
    RowReader,
    dtype_name,
    file_names,
    index_json,
    pack_files,
    read_index,
    write_file,
)
from msa_train.convert.safetensors_header import Entry
from msa_train.convert.tensor_map import (
    M2_NAMING,
    M3_TEXT_NAMING,
    Span,
    TensorTable,
    build_table,
    detect_naming,
)
from msa_train.runtime.untrusted_files import read_json

CONFIG_NAME = "config.json"
SHARD_BYTES = 5 * 10**9
PIECE_BYTES = 16 * 2**20
"rows of a tensor that are in memory at a time, unless a single row is larger"
_MAX_CONFIG_BYTES = 16 * 2**20
_MASTER = "optimizer.state.fp32_param."
_BIAS = ".router.expert_bias"


@dataclass(slots=True)
class ExportPlan:
    """Hold everything about an export, before a weight is read."""

    table: TensorTable
    "tensors under both names"
    files: dict[str, list[NewTensor]]
    "tensors of each safetensors file, by file name"
    config: dict[str, Any]
    "content of config.json"
    copied: list[str]
    "names of tensors that are taken from `like` as they are"

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.num_bytes for tensors in self.files.values() for tensor in tensors)


def plan_export(
    checkpoint: Path,
    model: ModelConfig,
    attention: AttentionConfig,
    *,
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    max_positions: int = 0,
    trained_len: int = 0,
    ignore: Collection[str] = (),
) -> ExportPlan:
    """Lay out the files.

    Args:
        checkpoint: folder of a checkpoint.
        model, attention: its shape.
        like: Hugging Face folder whose names, files and config.json are taken over, with the tensors that
            have no place in our model (vision tower and so on). None: new files in the usual spelling.
        dtype: of the result, None for that of the checkpoint. fp32 takes the optimizer's master weights where
            the checkpoint has them. The expert bias keeps its type.
        shard_bytes: largest file in bytes, but for single tensors that are larger.
        max_positions: for config.json, tokens. 0: at least trained_len, and what `like` has, or
            DEFAULT_MAX_POSITIONS.
        trained_len: tokens of the longest packs that the checkpoint was trained with; 0: unknown.
        ignore: fields of the config.json in `like` to treat as absent.

    Raises:
        ValueError: one line, if the checkpoint lacks tensors or `like` is of another model.
    """
    # nothing but shapes and dtypes is read here
    weights = _Weights(checkpoint, dtype)
    if like is not None:
        config = _config_like(like, model, attention, ignore, max_positions, trained_len)
        _note_dtype(config, dtype)
        return _plan_like(like, model, attention, config, weights)
    # spellings that transformers writes itself: per expert for M2, fused for the bare text model of M3
    naming = M2_NAMING if family_of(model) is Family.m2 else M3_TEXT_NAMING
    table = build_table(model, attention, naming)
    packed = pack_files(list(_tensors(table, weights).values()), shard_bytes)
    files = dict(zip(file_names(len(packed)), packed, strict=True))
    stored = str(weights.dtype("decoder.final_layernorm.weight")).removeprefix("torch.")
    positions = max_positions or max(DEFAULT_MAX_POSITIONS, trained_len)
    config = write_hf_config(model, attention, dtype=stored, max_positions=positions)
    return ExportPlan(table, files, config, [])


def _plan_like(
    like: Path, model: ModelConfig, attention: AttentionConfig, config: dict[str, Any], weights: "_Weights"
) -> ExportPlan:
    """Lay out the files of `like`, with our tensors in the place of theirs."""
    entries = read_index(like)
    table = build_table(model, attention, detect_naming(entries))
    tensors = _tensors(table, weights)
    for name, tensor in tensors.items():
        if name not in entries or entries[name].shape != tensor.shape:
            found = f"has shape {list(entries[name].shape)}" if name in entries else "is not there"
            raise ValueError(
                f"tensor {name}: {found} in {like}, this model has {list(tensor.shape)}; use the folder that "
                "the weights came from"
            )
    # the same files in the same order, so that the folder can stand in for the original one
    copied = [name for name in entries if name not in tensors]
    files: dict[str, list[NewTensor]] = {}
    for name, entry in entries.items():
        files.setdefault(entry.file.name, []).append(tensors.get(name) or _copy(name, entry))
    return ExportPlan(table, files, config, copied)


def write_export(plan: ExportPlan, folder: Path, progress: Callable[[int], None]) -> None:
    """Write all files into `folder`, which appears whole or not at all.

    Args:
        plan: from `plan_export`.
        folder: does not exist yet, or is empty.
        progress: told the bytes of each piece.
    """
    partial_folder = folder.with_name(f".{folder.name}.partial")
    # left by an export that was killed
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        for name, tensors in plan.files.items():
            write_file(partial_folder / name, tensors, progress)
        if len(plan.files) > 1:
            _write_json(partial_folder / INDEX_NAME, index_json(plan.files))
        _write_json(partial_folder / CONFIG_NAME, plan.config)
        # fails where the folder has got content in the meantime
        if folder.exists():
            folder.rmdir()
        partial_folder.rename(folder)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise


class _Weights:
    """Read rows of the checkpoint, in the wanted type."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype | None) -> None:
        self.checkpoint, self.wanted = checkpoint, dtype
        self.reader = ShardedReader(checkpoint)
        self.shapes = self.reader.shapes()

    def source(self, key: str) -> str:
        """Return the key to read: the master weight where fp32 is wanted and there is one."""
        master = _MASTER + key
        return master if self.wanted is torch.float32 and master in self.shapes else key

    def dtype(self, key: str) -> torch.dtype:
        """Return the type that a tensor is written in; the expert bias keeps its own, as it is no weight."""
        stored = self.reader.dtype(self.source(key))
        return stored if self.wanted is None or key.endswith(_BIAS) else self.wanted

    def pieces(self, spans: list[Span]) -> Iterator[Tensor]:
        """Yield the rows of spans one after another, at most PIECE_BYTES at a time.

        Example: rows of 6,144 bf16 numbers have 12,288 bytes, so a piece has up to 1,365 of them.
        """
        for span in spans:
            shape = self.shapes[span.key]
            row_bytes = (shape[-1] if len(shape) > 1 else 1) * self.dtype(span.key).itemsize
            # rows of the written type; a row larger than a piece is read whole
            step = max(1, PIECE_BYTES // row_bytes)
            for at in range(0, span.num_rows, step):
                count = min(step, span.num_rows - at)
                rows = self.reader.rows(self.source(span.key), span.key_row + at, count)
                yield rows.to(self.dtype(span.key))


def _tensors(table: TensorTable, weights: _Weights) -> dict[str, NewTensor]:
    for key, shape in table.shapes.items():
        if weights.shapes.get(key) != shape:
            found = f"shape {list(weights.shapes[key])}" if key in weights.shapes else "nothing"
            raise ValueError(
                f"checkpoint {weights.checkpoint}: has {found} for {key}, which should be {list(shape)}"
            )
    # nothing is read here: each tensor gets a function that yields its rows when its file is written
    result: dict[str, NewTensor] = {}
    spans_of = table.by_name()
    for name, shape in table.hf_shapes.items():
        spans = spans_of[name]
        # all spans of a tensor of theirs lie in one tensor of ours
        dtype = weights.dtype(spans[0].key)
        result[name] = NewTensor(
            name=name,
            dtype=dtype_name(dtype),
            shape=shape,
            num_bytes=torch.Size(shape).numel() * dtype.itemsize,
            pieces=partial(weights.pieces, spans),
        )
    return result


def _copy(name: str, entry: Entry) -> NewTensor:
    """Take a tensor of another checkpoint as it is, of any type."""
    return NewTensor(
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        num_bytes=entry.end - entry.begin,
        pieces=partial(_raw_pieces, entry),
    )


def _raw_pieces(entry: Entry) -> Iterator[Tensor]:
    reader = RowReader()
    try:
        for at in range(0, entry.end - entry.begin, PIECE_BYTES):
            piece = torch.empty(min(PIECE_BYTES, entry.end - entry.begin - at), dtype=torch.uint8)
            reader.read_into(entry, at, piece)
            yield piece
    finally:
        reader.close()


def _config_like(
    like: Path,
    model: ModelConfig,
    attention: AttentionConfig,
    ignore: Collection[str],
    max_positions: int,
    trained_len: int,
) -> dict[str, Any]:
    """Read config.json of `like`, which must mean this model but for what an extension changes.

    Left at what they were before it, its positions would make servers cut sequences off.
    """
    given = read_config_file(like)
    # what can be read can be changed
    before = read_hf_config(given, ignore=ignore).max_positions
    longer = trained_len if before and trained_len > before else 0
    config = extend_hf_config(given, model, attention, max_positions=max_positions or longer)
    theirs, ours = read_hf_config(config, ignore=ignore), write_hf_config(model, attention, dtype="float32")
    if theirs.fp8_block is not None:
        raise ValueError(f"{like}: has 8-bit weights, which are not written; export without --like")
    # both sides go through the same reader, so only a difference in meaning counts
    mine = read_hf_config(ours)
    for part, other in ((theirs.model, mine.model), (theirs.attention, mine.attention)):
        section = "model" if part is theirs.model else "attention"
        for field in part.__dataclass_fields__:
            # without meaning where no layer is dense, written in several ways, or of initialisation alone
            if field in ("ffn_hidden_size", "layer_attention") or field.endswith("std"):
                continue
            if getattr(part, field) != getattr(other, field):
                raise ValueError(
                    f"{section}.{field}={getattr(other, field)}: {like} is of another model, with "
                    f"{getattr(part, field)}; use the folder that the weights came from"
                )
    if theirs.model.attention_kinds() != mine.model.attention_kinds():
        raise ValueError(f"model.layer_attention={model.layer_attention}: {like} has other kinds of layers")
    return config


def _note_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Name the type of the weights where the config.json names one."""
    for part in (config, config.get("text_config")):
        for field in ("dtype", "torch_dtype"):
            if dtype is not None and isinstance(part, dict) and field in part:
                part[field] = str(dtype).removeprefix("torch.")


def read_config_file(folder: Path) -> dict[str, Any]:
    """Read the content of config.json.

    Raises:
        ValueError: one line, if it is not there or no JSON object.
    """
    return read_json(folder, CONFIG_NAME, _MAX_CONFIG_BYTES)


def _write_json(path: Path, value: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())

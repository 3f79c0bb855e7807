"""A checkpoint of ours becomes a Hugging Face checkpoint, piece by piece: no tensor is ever held whole."""

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
_MAX_CONFIG_BYTES = 16 * 2**20
_MASTER = "optimizer.state.fp32_param."
_BIAS = ".router.expert_bias"


@dataclass(slots=True)
class ExportPlan:
    """Everything about an export, before a weight is read.

    files: tensors of each safetensors file. config: content of config.json.
    copied: tensors that are taken from `like` as they are.
    """

    table: TensorTable
    files: dict[str, list[NewTensor]]
    config: dict[str, Any]
    copied: list[str]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.num_bytes for tensors in self.files.values() for tensor in tensors)


def plan_export(
    checkpoint: Path,
    model: ModelConfig,
    attention: AttentionConfig,
    *,
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    max_positions: int = DEFAULT_MAX_POSITIONS,
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
        shard_bytes: largest file, but for single tensors that are larger.
        max_positions: for config.json.
        ignore: fields of the config.json in `like` to treat as absent.

    Raises:
        ValueError: one line, if the checkpoint lacks tensors or `like` is of another model.
    """
    weights = _Weights(checkpoint, dtype)
    if like is not None:
        config = _config_like(like, model, attention, ignore)
        _note_dtype(config, dtype)
        return _plan_like(like, model, attention, config, weights)
    naming = M2_NAMING if family_of(model) is Family.m2 else M3_TEXT_NAMING
    table = build_table(model, attention, naming)
    packed = pack_files(list(_tensors(table, weights).values()), shard_bytes)
    files = dict(zip(file_names(len(packed)), packed, strict=True))
    stored = str(weights.dtype("decoder.final_layernorm.weight")).removeprefix("torch.")
    config = write_hf_config(model, attention, dtype=stored, max_positions=max_positions)
    return ExportPlan(table, files, config, [])


def _plan_like(
    like: Path, model: ModelConfig, attention: AttentionConfig, config: dict[str, Any], weights: "_Weights"
) -> ExportPlan:
    """The files of `like`, our tensors in the place of theirs."""
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
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        for name, tensors in plan.files.items():
            write_file(partial_folder / name, tensors, progress)
        if len(plan.files) > 1:
            _write_json(partial_folder / INDEX_NAME, index_json(plan.files))
        _write_json(partial_folder / CONFIG_NAME, plan.config)
        if folder.exists():
            folder.rmdir()
        partial_folder.rename(folder)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise


class _Weights:
    """Rows of the checkpoint, in the wanted type."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype | None) -> None:
        self.checkpoint, self.wanted = checkpoint, dtype
        self.reader = ShardedReader(checkpoint)
        self.shapes = self.reader.shapes()

    def source(self, key: str) -> str:
        """Key to read: the master weight where fp32 is wanted and there is one."""
        master = _MASTER + key
        return master if self.wanted is torch.float32 and master in self.shapes else key

    def dtype(self, key: str) -> torch.dtype:
        """Type that a tensor is written in."""
        stored = self.reader.dtype(self.source(key))
        return stored if self.wanted is None or key.endswith(_BIAS) else self.wanted

    def pieces(self, spans: list[Span]) -> Iterator[Tensor]:
        """The rows of spans one after another, a limited number at a time."""
        for span in spans:
            shape = self.shapes[span.key]
            row_bytes = (shape[-1] if len(shape) > 1 else 1) * self.dtype(span.key).itemsize
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
    result: dict[str, NewTensor] = {}
    spans_of = table.by_name()
    for name, shape in table.hf_shapes.items():
        spans = spans_of[name]
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
    """A tensor of another checkpoint as it is, of any type."""
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
    like: Path, model: ModelConfig, attention: AttentionConfig, ignore: Collection[str]
) -> dict[str, Any]:
    """config.json of `like`, which must mean this model but for what an extension changes."""
    given = read_config_file(like)
    # what can be read can be changed
    read_hf_config(given, ignore=ignore)
    config = extend_hf_config(given, model, attention)
    theirs, ours = read_hf_config(config, ignore=ignore), write_hf_config(model, attention, dtype="float32")
    if theirs.fp8_block is not None:
        raise ValueError(f"{like}: has 8-bit weights, which are not written; export without --like")
    mine = read_hf_config(ours)
    for part, other in ((theirs.model, mine.model), (theirs.attention, mine.attention)):
        section = "model" if part is theirs.model else "attention"
        for field in part.__dataclass_fields__:
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
    """Content of config.json.

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

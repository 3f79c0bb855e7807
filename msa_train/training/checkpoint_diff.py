"""What differs between two checkpoints, read in pieces of some megabytes whatever their sizes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from msa_train.model.sharded_files import ShardedReader
from msa_train.training.checkpoint_files import read_meta
from msa_train.training.checkpoint_formats import current_key
from msa_train.training.finite_state import listed, not_finite

PIECE_BYTES = 16 * 2**20
# meta.json's other entries follow from these or change with every save
_COMPARED_META = (
    "format_version",
    "content",
    "step",
    "optimizer_updates",
    "engine",
    "optimizer",
    "precision",
)
# of the record of the data; where they lay and what they were before says nothing about these steps
_NOT_COMPARED_DATA = {"corpus", "tokenizer", "before"}


@dataclass(slots=True)
class TensorDiff:
    """Two tensors under one key; notes: shape and type where they differ, else the numbers were compared."""

    key: str
    notes: list[str] = field(default_factory=list[str])
    num_different: int = 0
    num_elements: int = 0
    max_abs: float = 0.0
    "largest difference; inf where one of them alone is not a number"


@dataclass(slots=True)
class CheckpointDiff:
    """settings: by name, in meta.json of both; missing: keys that only the first has; extra: the second."""

    settings: dict[str, tuple[Any, Any]]
    missing: list[str]
    extra: list[str]
    different: list[TensorDiff]
    num_equal: int
    worst: float

    @property
    def is_empty(self) -> bool:
        """Whether both hold the same."""
        return not (self.settings or self.missing or self.extra or self.different)


def diff_checkpoints(
    first: Path, second: Path, *, tolerance: float = 0.0, progress: Callable[[str], None] | None = None
) -> CheckpointDiff:
    """Compare settings and every number of two checkpoint folders.

    Args:
        first, second: published checkpoints, written by any layouts.
        tolerance: of absolute differences that do not count.
        progress: called with each key before it is read.
    """
    readers = ShardedReader(first), ShardedReader(second)
    keys = [{current_key(key): key for key in reader.shapes()} for reader in readers]
    different, num_equal, worst = [], 0, 0.0
    for name in sorted(keys[0].keys() & keys[1].keys()):
        if progress is not None:
            progress(name)
        diff = _diff_tensor(readers, (keys[0][name], keys[1][name]), name)
        worst = max(worst, diff.max_abs)
        if diff.notes or diff.max_abs > tolerance:
            different.append(diff)
        else:
            num_equal += 1
    return CheckpointDiff(
        settings=_diff_meta(read_meta(first), read_meta(second)),
        missing=sorted(keys[0].keys() - keys[1].keys()),
        extra=sorted(keys[1].keys() - keys[0].keys()),
        different=different,
        num_equal=num_equal,
        worst=worst,
    )


def values_damage(folder: Path) -> str | None:
    """Which tensors of a checkpoint are not finite: "not finite: a, b"; None if all are."""
    reader = ShardedReader(folder)

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for key, shape in reader.shapes().items():
            for first_row, count in pieces(shape):
                yield key, reader.rows(key, first_row, count)

    names = listed([not_finite(read())])
    return f"not finite: {names}" if names else None


def _diff_meta(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    def settings(meta: dict[str, Any]) -> dict[str, Any]:
        data = meta.get("data")
        record = data if isinstance(data, dict) else {}
        compared = {f"data.{key}": value for key, value in record.items() if key not in _NOT_COMPARED_DATA}
        return {key: meta.get(key) for key in _COMPARED_META} | dict(meta.get("fingerprint", {})) | compared

    ours, theirs = settings(first), settings(second)
    names = dict.fromkeys([*ours, *theirs])
    return {key: (ours.get(key), theirs.get(key)) for key in names if ours.get(key) != theirs.get(key)}


def _diff_tensor(
    readers: tuple[ShardedReader, ShardedReader], keys: tuple[str, str], name: str
) -> TensorDiff:
    shapes = [reader.shapes()[key] for reader, key in zip(readers, keys, strict=True)]
    dtypes = [reader.dtype(key) for reader, key in zip(readers, keys, strict=True)]
    result = TensorDiff(name)
    if dtypes[0] != dtypes[1]:
        result.notes.append(f"type {_type(dtypes[0])}, {_type(dtypes[1])}")
    if shapes[0] != shapes[1]:
        result.notes.append(f"shape {_shape(shapes[0])}, {_shape(shapes[1])}")
        return result
    for first_row, count in pieces(shapes[0]):
        a, b = (
            reader.rows(key, first_row, count).double() for reader, key in zip(readers, keys, strict=True)
        )
        is_different = ~((a == b) | (a.isnan() & b.isnan()))
        result.num_elements += a.numel()
        result.num_different += int(is_different.sum())
        if is_different.any():
            gap = (a - b).abs()[is_different]
            result.max_abs = max(result.max_abs, float(torch.nan_to_num(gap, nan=float("inf")).max()))
    return result


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First row and number of rows of small pieces of [R], [R, C] or [E, R, C], none over two of E.

    Example: (2, 3, C) with two rows to a piece -> (0, 2), (2, 1), (3, 2), (5, 1).
    """
    experts, rows, columns = {1: (1, *shape, 1), 2: (1, *shape), 3: shape}[len(shape)]
    at_once = max(1, PIECE_BYTES // (8 * max(columns, 1)))
    for expert in range(experts):
        for row in range(0, rows, at_once):
            yield expert * rows + row, min(at_once, rows - row)


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))

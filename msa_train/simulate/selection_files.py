"""Reading one part of a recording of selections, see selections.py, whoever wrote it."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from msa_train.config.text import excerpt
from msa_train.foreign_files import open_regular

FORMAT = "msa_selections 1"
_COUNTS = ("seq_len", "block_size", "num_kv_heads", "topk", "first_token", "num_tokens", "chunk_tokens")
_LISTS = ("cu_seqlens", "layers", "sample_position")
_FIELDS = ("format", *_COUNTS, *_LISTS, "needed_bits", "sample_blocks", "source")

Fields = dict[str, Any]


def read_part(path: Path) -> Fields:
    """The fields of a part: whole numbers, texts and arrays.

    Raises:
        ValueError: one line, if it is no recording, contradicts itself, or takes half the free memory.
    """
    try:
        fields = _load(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: cannot be read (no such file); name a recording, a file or a folder of parts"
        ) from None
    except (Exception, MemoryError) as error:
        # numpy, zipfile and zlib have many kinds of errors for damaged files
        raise ValueError(f"{path}: is not an .npz file ({excerpt(str(error))}); record again") from error
    missing = [name for name in _FIELDS if name not in fields]
    if missing or str(fields["format"]) != FORMAT:
        raise ValueError(
            f"{path}: is not a recording of selections ({FORMAT}); record it with SelectionRecorder"
        )
    try:
        return _checked(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; record again") from None


def _load(path: Path) -> dict[str, NDArray[Any]]:
    with open_regular(path) as file:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        free = psutil.virtual_memory().available
        if size > free // 2:
            raise ValueError(f"it unpacks to {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free")
        file.seek(0)
        with np.load(file, allow_pickle=False) as part:
            return {name: part[name] for name in part.files if name in _FIELDS}


def _checked(fields: dict[str, NDArray[Any]]) -> Fields:
    """The same fields, of the kinds and sizes that belong together."""
    found: Fields = {name: _count(name, fields[name]) for name in _COUNTS}
    block, chunk = found["block_size"], found["chunk_tokens"]
    for name, unit in (
        ("chunk_tokens", block),
        ("seq_len", chunk),
        ("first_token", chunk),
        ("num_tokens", chunk),
    ):
        if found[name] % unit:
            raise ValueError(f"{name}={found[name]}: must be a multiple of {unit}")
    first, last = found["first_token"], found["first_token"] + found["num_tokens"]
    if last > found["seq_len"]:
        raise ValueError(f"num_tokens={found['num_tokens']}: goes beyond seq_len={found['seq_len']}")
    for name in _LISTS:
        found[name] = _whole(name, fields[name], dims=1)
    starts = found["cu_seqlens"]
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != found["seq_len"] or (np.diff(starts) <= 0).any():
        raise ValueError(f"cu_seqlens={excerpt(str(starts))}: must rise from 0 to seq_len={found['seq_len']}")
    layers, num_blocks = len(found["layers"]), found["seq_len"] // block
    if not layers:
        raise ValueError("layers=[]: must name a layer")
    heads, num_chunks = found["num_kv_heads"], found["num_tokens"] // chunk
    bits = fields["needed_bits"]
    _check_shape("needed_bits", bits, (layers, num_chunks, heads, -(-num_blocks // 8)))
    if bits.dtype != np.uint8:
        raise ValueError(f"needed_bits.dtype={bits.dtype}: must be uint8")
    _check_range("sample_position", found["sample_position"], first, last)
    blocks = _whole("sample_blocks", fields["sample_blocks"], dims=4)
    _check_shape("sample_blocks", blocks, (layers, len(found["sample_position"]), heads, found["topk"]))
    _check_range("sample_blocks", blocks, -1, num_blocks)
    return found | {
        "needed_bits": bits,
        "sample_blocks": blocks,
        "source": excerpt(str(fields["source"]), 400),
    }


def _count(name: str, value: NDArray[Any]) -> int:
    if value.shape != () or value.dtype.kind not in "iu":
        raise ValueError(f"{name}={excerpt(str(value), 60)}: must be a whole number")
    number, least = int(value), int(name != "first_token")
    if not least <= number < 2**62:
        raise ValueError(f"{name}={number}: must be a whole number from {least} on")
    return number


def _whole(name: str, values: NDArray[Any], *, dims: int) -> NDArray[Any]:
    if values.ndim != dims or values.dtype.kind not in "iu":
        raise ValueError(f"{name}: must be whole numbers in {dims} dimensions")
    return values


def _check_shape(name: str, values: NDArray[Any], shape: Sequence[int]) -> None:
    if values.shape != tuple(shape):
        raise ValueError(f"{name}.shape={values.shape}: must be {tuple(shape)}")


def _check_range(name: str, values: NDArray[Any], first: int, last: int) -> None:
    if values.size and not first <= int(values.min()) <= int(values.max()) < last:
        raise ValueError(
            f"{name}: has values from {values.min()} to {values.max()}, must be from {first} to {last - 1}"
        )

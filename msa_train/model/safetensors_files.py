"""Reading rows of safetensors files, and writing files of which no tensor is ever held whole.

The safetensors package maps files into memory to read and wants all tensors of a file to write. The format
stands in `safetensors_header.py`.
"""

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from msa_train.config.text import excerpt
from msa_train.foreign_files import is_plain_name, member, open_regular, read_json
from msa_train.model.safetensors_header import Entry, read_header

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SUFFIX = ".safetensors"
# 25,000 tensors of M3 take 3 MB
_MAX_INDEX_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write; `pieces` yields its rows in order, as tensors whose bytes follow one another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    pieces: Callable[[], Iterator[Tensor]]


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "BF16".

    Raises:
        ValueError: for a type that models are not stored in.
    """
    if dtype not in _NAMES:
        raise ValueError(f"dtype {dtype}: is not supported; use one of {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]


def read_index(folder: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint folder by name, in the order of the files.

    Raises:
        ValueError: one line, if there is no checkpoint, a file is missing, damaged or a link out of the
            folder, or a tensor is not in the file that the index names.
    """
    places = _read_places(folder)
    entries: dict[str, Entry] = {}
    for name in sorted(set(places.values())) or [SINGLE_NAME]:
        for tensor, entry in read_header(_file_of(folder, name)).items():
            if tensor in entries:
                raise ValueError(
                    f"tensor {excerpt(tensor)}: is in {entries[tensor].file.name} and in {name}; keep one"
                )
            entries[tensor] = replace(entry, file=folder / name)
    for tensor, name in places.items():
        if tensor not in entries or entries[tensor].file.name != name:
            raise ValueError(
                f"tensor {excerpt(tensor)}: {INDEX_NAME} says it is in {name}, where it is not; fetch both "
                "files again"
            )
    return entries


def _read_places(folder: Path) -> dict[str, str]:
    """File of each tensor, from the index; empty where there is none."""
    index = folder / INDEX_NAME
    if not os.path.lexists(index):
        return {}
    places = read_json(folder, INDEX_NAME, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: is not JSON with a weight_map; fetch the file again")
    for tensor, name in places.items():
        if not is_plain_name(name) or not name.endswith(_SUFFIX):
            raise ValueError(
                f"{index}: says that {excerpt(tensor)} is in {excerpt(str(name))}, which must be the "
                f"name of a {_SUFFIX} file in the folder; fetch the file again"
            )
    return places


def _file_of(folder: Path, name: str) -> Path:
    try:
        return member(folder, name)
    except OSError as error:
        reason = "does not exist" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
        raise ValueError(f"{folder / name}: {reason}; fetch it, or name the folder that holds it") from None


class RowReader:
    """Reads rows of tensors; keeps one file open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: IO[bytes] | None = None

    def read_into(self, entry: Entry, row: int, out: Tensor) -> None:
        """Fill `out`, [rows, ...] of the entry's dtype and contiguous, with rows from `row` on.

        Rows of a tensor with three dimensions are those of its last two, counted over the first.
        """
        first = entry.begin + row * (out[0].numel() if out.numel() else 0) * out.element_size()
        file = self._open(entry.file)
        file.seek(first)
        data = out.view(-1).view(torch.uint8).numpy().data
        assert first + len(data) <= entry.end, f"rows from {row} on are beyond the tensor's end"
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise ValueError(f"{entry.file}: ends too early; fetch it again")

    def _open(self, path: Path) -> IO[bytes]:
        if self._file is None or self._path != path:
            self.close()
            self._path, self._file = path, open_regular(path)
        return self._file

    def close(self) -> None:
        """Close the file that is open, if any."""
        if self._file is not None:
            self._file.close()
        self._path = self._file = None


def write_file(path: Path, tensors: list[NewTensor], progress: Callable[[int], None]) -> None:
    """Write one file, piece by piece, and bring it to the disk.

    Args:
        path: the file.
        tensors: in their order in the file.
        progress: told the bytes of each piece.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        place = [at, at + tensor.num_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        at = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    # data begin at a multiple of 8 bytes
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            written = 0
            for piece in tensor.pieces():
                data = piece.contiguous().view(-1).view(torch.uint8).numpy().data
                file.write(data)
                written += len(data)
                progress(len(data))
            assert written == tensor.num_bytes, f"{tensor.name}: {written} of {tensor.num_bytes} bytes"
        file.flush()
        os.fsync(file.fileno())


def pack_files(tensors: list[NewTensor], max_bytes: int) -> list[list[NewTensor]]:
    """Deal tensors over files of at most `max_bytes`, in order; a larger tensor has a file to itself."""
    files: list[list[NewTensor]] = []
    room = 0
    for tensor in tensors:
        if not files or tensor.num_bytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(tensor)
        room -= tensor.num_bytes
    return files


def file_names(count: int) -> list[str]:
    """One file is model.safetensors, several are model-00001-of-00003.safetensors and so on."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def index_json(files: Mapping[str, list[NewTensor]]) -> dict[str, object]:
    """Content of model.safetensors.index.json."""
    places = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    size = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}

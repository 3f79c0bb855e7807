"""Reading rows of safetensors files, and writing files of which no tensor is ever held whole.

The safetensors package maps files into memory to read and wants all tensors of a file to write. The format is
simple: 8 bytes length of the header (little endian), the header (JSON: dtype, shape and byte range of each
tensor), the bytes.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: dtype as safetensors spells it, first and last byte (exclusive) in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


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
        ValueError: one line, if there is no checkpoint, a file is missing or cut short, or the index names
            tensors that its files do not hold.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{index}: is not JSON with a weight_map; fetch the file again") from None
        files = sorted(set(places.values()))
    else:
        files, places = [SINGLE_NAME], {}
    entries: dict[str, Entry] = {}
    for name in files:
        for tensor, entry in read_header(folder / name).items():
            if tensor in entries:
                raise ValueError(
                    f"tensor {tensor}: is in {entries[tensor].file.name} and in {name}; keep one"
                )
            entries[tensor] = entry
    lacking = [name for name in places if name not in entries]
    if lacking:
        raise ValueError(
            f"tensor {lacking[0]}: {INDEX_NAME} says it is in {places[lacking[0]]}, where it is not; fetch "
            "both files again"
        )
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors of one file, by place.

    Raises:
        ValueError: one line, if it is missing, no safetensors file, or cut short.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError
            header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        header.pop("__metadata__", None)
        first = 8 + length
        entries = {
            name: Entry(path, one["dtype"], tuple(one["shape"]), *(first + at for at in one["data_offsets"]))
            for name, one in header.items()
        }
    except FileNotFoundError:
        raise ValueError(f"{path}: does not exist; fetch it, or name the folder that holds it") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise ValueError(f"{path}: is not a safetensors file; fetch it again") from None
    needed = max((entry.end for entry in entries.values()), default=0)
    if size < needed:
        raise ValueError(f"{path}: has {size} of {needed} bytes; fetch it again")
    return dict(sorted(entries.items(), key=lambda item: item[1].begin))


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
            self._path, self._file = path, path.open("rb")
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

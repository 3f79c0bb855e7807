"""What a safetensors file says about its tensors, checked by the rules of the safetensors package itself.

8 bytes length of the header (little endian), the header (JSON: dtype, shape and byte range of each tensor),
the bytes. Ranges follow one another without gaps from the first byte to the end of the file, and each is as
long as its shape and dtype ask for: where one digit is damaged, two of these disagree.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from msa_train.config.text import excerpt
from msa_train.foreign_files import open_regular, parse_json

MAX_HEADER_BYTES = 100 * 2**20
_BITS = {
    **{
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "BOOL": 8,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
    },
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32},
    **{"F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: dtype as safetensors spells it, first and last byte (exclusive) in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors of one file, by place.

    Raises:
        ValueError: one line, if it is missing, no safetensors file, damaged or cut short.
    """
    try:
        with open_regular(path) as file:
            return parse_header(path, file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise ValueError(f"{path}: does not exist; fetch it, or name the folder that holds it") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def parse_header(path: Path, file: BinaryIO, size: int) -> dict[str, Entry]:
    """The same of an open file of so many bytes; errors as of `read_header`."""
    try:
        header = _header(file, size)
        first = file.tell()
        entries = [_entry(path, name, one, first) for name, one in header.items() if name != "__metadata__"]
        _check_metadata(header.get("__metadata__"))
        entries.sort(key=lambda item: (item[1].begin, item[1].end))
        end = _check_places(entries, first)
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path}: is not a safetensors file ({error}); fetch it again") from None
    if size != end:
        raise ValueError(f"{path}: has {size} of {end} bytes; fetch it again")
    return dict(entries)


def _header(file: BinaryIO, size: int) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    try:
        header = parse_json(file.read(length).decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"its header {error}") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header


def _entry(path: Path, name: str, value: Any, first: int) -> tuple[str, Entry]:
    """A tensor, the bytes of which are as many as its shape and dtype ask for."""
    what = f"tensor {excerpt(name)}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} has not just dtype, shape and data_offsets")
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{what} has dtype {excerpt(str(dtype), 20)}")
    if not _are_sizes(shape) or not _are_sizes(place) or len(place) != 2:
        raise ValueError(f"{what} has a shape or place that is not in whole numbers")
    bits = _BITS[dtype]
    for number in shape:
        bits *= number
    if bits != 8 * (place[1] - place[0]):
        raise ValueError(f"{what} has {place[1] - place[0]} bytes for {dtype} {excerpt(str(shape), 60)}")
    return name, Entry(path, dtype, tuple(shape), first + place[0], first + place[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(one) is int and 0 <= one < 2**63 for one in values)


def _check_metadata(values: Any) -> None:
    """Texts by name; Megatron, transformers and the hub keep nothing else here."""
    if values is None:
        return
    if not isinstance(values, dict) or not all(isinstance(one, str) for one in values.values()):
        raise ValueError("its __metadata__ is not texts by name")


def _check_places(entries: list[tuple[str, Entry]], at: int) -> int:
    """Check that tensors follow one another without gaps; returns where the last one ends."""
    for name, entry in entries:
        if entry.begin != at:
            raise ValueError(f"tensor {excerpt(name)} begins at byte {entry.begin} instead of {at}")
        at = entry.end
    return at

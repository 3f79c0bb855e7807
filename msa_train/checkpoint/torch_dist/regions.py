"""Read parts of stored tensors, and of the files nothing else.

PyTorch's reader loads every stored piece whole and takes from it what is wanted: where four ranks want a
quarter each, it reads everything four times. torch.save stores numbers row by row, so the wanted rows are
read from where they are, straight into their place where that is memory of the host.
"""

import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo

from msa_train.checkpoint.torch_dist.boxes import Box, Shape, row_major
from msa_train.checkpoint.torch_dist.files import first_byte

# shorter runs of numbers are read with what lies between them, which costs less than to leave it out
_SHORT_BYTES = 4096


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """Name a box of a stored piece; regions sort by their place on the disk."""

    file: str
    "in the checkpoint's folder"
    offset: int
    "where the stored piece begins, with what torch.save writes around it"
    length: int
    "bytes of it"
    sizes: Shape
    "of the stored piece"
    begin: Shape
    "first wanted element in each dimension"
    wanted: Shape
    "elements wanted in each dimension"
    dtype: str
    "torch's name of the stored type, e.g. bfloat16"

    @property
    def type(self) -> torch.dtype:
        """Return the stored type."""
        return getattr(torch, self.dtype)

    @property
    def item_bytes(self) -> int:
        """Return the size of one number."""
        return self.type.itemsize

    @property
    def num_bytes(self) -> int:
        """Return the size of what is wanted."""
        return math.prod(self.wanted) * self.item_bytes


class RegionReader:
    """Read regions of one checkpoint; those of one file are best read one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[bytes] | None = None
        self._name = ""
        self._first_bytes: dict[tuple[str, int], int | None] = {}

    def read(self, region: Region, out: Tensor) -> None:
        """Fill `out`, a contiguous tensor on the host, of the region's shape and the stored type.

        Raises:
            ValueError: one line, if the file ends too early.
            OSError: if it cannot be read.
        """
        file = self._open(region.file)
        begin = self._begin_of(file, region)
        if begin is None:
            box = Box(region.begin, region.wanted)
            out.copy_(box.of(_load_whole(self.folder / region.file, region)))
        elif out.numel():
            _fill(file, begin, region, out)

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file.close()
        self._file, self._name = None, ""

    def _open(self, name: str) -> IO[bytes]:
        if self._file is None or self._name != name:
            self.close()
            self._file, self._name = (self.folder / name).open("rb"), name
        return self._file

    def _begin_of(self, file: IO[bytes], region: Region) -> int | None:
        """Find where the numbers of a stored piece begin; None if they are not row by row."""
        key = (region.file, region.offset)
        if key not in self._first_bytes:
            try:
                found = first_byte(file, _StorageInfo(region.file, region.offset, region.length))
            except ValueError:
                found = None
            self._first_bytes[key] = found
        return self._first_bytes[key]


def read_bytes(file: IO[bytes], at: int, out: memoryview) -> None:
    """Fill `out` from a place of a file on; all that is read of tensors is read here."""
    done = 0
    while done < len(out):
        count = os.preadv(file.fileno(), [out[done:]], at + done)
        if count == 0:
            raise ValueError(f"{file.name}: ends too early; use another checkpoint")
        done += count


def in_pieces(lengths: Shape, most: int) -> Iterator[Box]:
    """Cut a box into boxes of at most so many elements: whole rows as long as those are not larger.

    Example: (4, 5) and 10 -> rows 0 and 1, rows 2 and 3; (1, 5) and 3 -> elements 0 to 2, 3 and 4.
    """
    dim = next((d for d, size in enumerate(lengths) if size > 1), None)
    if dim is None or math.prod(lengths) <= most:
        yield Box((0,) * len(lengths), lengths)
        return
    inner = lengths[dim + 1 :]
    rows = max(most // max(math.prod(inner), 1), 1)
    # a row that is too large is cut further
    parts = list(in_pieces(inner, most))
    for first in range(0, lengths[dim], rows):
        count = min(rows, lengths[dim] - first)
        for part in parts:
            yield Box((*(0,) * dim, first, *part.offsets), (*lengths[:dim], count, *part.sizes))


def _fill(file: IO[bytes], begin: int, region: Region, out: Tensor) -> None:
    """Read a region run by run; a run is what lies together in the file."""
    sizes, wanted = region.sizes, region.wanted
    whole = len(sizes)
    while whole and wanted[whole - 1] == sizes[whole - 1]:
        whole -= 1
    # of the dimension before those that are wanted whole a range is, and lies together with them
    outer = max(whole - 1, 0)
    run = math.prod(wanted[outer:])
    if run * region.item_bytes < _SHORT_BYTES and run < out.numel():
        _fill_with_gaps(file, begin, region, out, outer)
        return
    strides = row_major(sizes)
    first = sum(a * b for a, b in zip(region.begin, strides, strict=True))
    data: Any = out.view(-1).view(torch.uint8).numpy().data
    run_bytes = run * region.item_bytes
    for number, index in enumerate(product(*(range(size) for size in wanted[:outer]))):
        at = first + sum(a * b for a, b in zip(index, strides[:outer], strict=True))
        read_bytes(file, begin + at * region.item_bytes, data[number * run_bytes : (number + 1) * run_bytes])


def _fill_with_gaps(file: IO[bytes], begin: int, region: Region, out: Tensor, outer: int) -> None:
    """Read rows whole and take from them what is wanted, some at a time."""

    def at_outer(shape: Shape, size: int) -> Shape:
        return (*shape[:outer], size, *shape[outer + 1 :])

    widened = at_outer(region.wanted, region.sizes[outer])
    for piece in in_pieces(widened, max(out.numel(), math.prod(widened[outer:]))):
        begins = at_outer(region.begin, 0)
        start = tuple(a + b for a, b in zip(begins, piece.offsets, strict=True))
        rows = torch.empty(piece.sizes, dtype=out.dtype)
        _fill(file, begin, replace(region, begin=start, wanted=piece.sizes), rows)
        cut = Box(piece.offsets, at_outer(piece.sizes, region.wanted[outer]))
        cut.of(out).copy_(rows.narrow(outer, region.begin[outer], region.wanted[outer]))


def _load_whole(path: Path, region: Region) -> Tensor:
    """Load a stored piece that is not stored row by row."""
    with path.open("rb") as file:
        file.seek(region.offset)
        return torch.load(io.BytesIO(file.read(region.length)), map_location="cpu", weights_only=True)

"""Write and read Megatron's torch_dist checkpoints piece by piece, in one process without process groups.

PyTorch's own writer wants the whole state at once and keeps a file's tensors until the file is complete. The
format is simple: each piece of a tensor is a `torch.save` at some place of some file, and `.metadata` (a
pickle) says where, and which box of the whole tensor it is. Readers take any boxes together, so how tensors
are cut here has nothing to do with the layout of a training.

Example: rows 0 and 1 of w [4, 8] and then rows 2 and 3 are added: one file __0_0.distcp with two pieces, and
`.metadata` says w is [4, 8] of boxes [2, 8] at (0, 0) and (2, 0), with file, offset and length of each.
"""

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from msa_train.checkpoint.torch_dist.safe_pickles import COMMON_NAME, METADATA_NAME, read_metadata

CONFIG_NAME = "metadata.json"


class ShardedWriter:
    """Write a checkpoint into an empty folder.

    Args:
        folder: exists.
        max_file_bytes: a new file is begun where this is exceeded.

    After `close`, `files` has size and CRC-32 (8 hexadecimal digits) of every file by name.
    """

    def __init__(self, folder: Path, *, max_file_bytes: int = 4 * 2**30) -> None:
        self.folder, self.max_file_bytes = folder, max_file_bytes
        self.files: dict[str, dict[str, Any]] = {}
        self._metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._stream: _CountingFile | None = None

    def add(self, key: str, shape: Sequence[int], offsets: Sequence[int], piece: Tensor) -> None:
        """Store a box of a tensor.

        Args:
            key: of the tensor in Megatron's sharded state.
            shape: of the whole tensor.
            offsets: first element of the box in each dimension.
            piece: the box's content, on the CPU; it need not outlive the call.
        """
        assert piece.dim() == len(shape) == len(offsets), f"{key}: {tuple(piece.shape)} of {tuple(shape)}"
        properties = TensorProperties(dtype=piece.dtype)
        # the first piece declares the tensor, each adds a box
        entry = self._metadata.setdefault(
            key, TensorStorageMetadata(properties=properties, size=torch.Size(shape), chunks=[])
        )
        assert isinstance(entry, TensorStorageMetadata), f"{key} is an object"
        index = MetadataIndex(key, torch.Size(offsets), index=len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=piece.shape))
        # a view would be stored with everything that it is a view of
        self._put(index, piece if piece.untyped_storage().nbytes() == piece.nbytes else piece.clone())

    def add_empty_object(self, key: str, num_experts: int = 0) -> None:
        """Store Megatron's extra state of a module, None; of every expert if there are experts."""
        shape, offsets = ((num_experts,), range(num_experts)) if num_experts else ((1,), range(1))
        for offset in offsets:
            unique = ShardedObject(key, None, shape, (offset,)).unique_key
            self._metadata[unique] = BytesStorageMetadata()
            self._put(MetadataIndex(unique), [None])

    def close(self) -> None:
        """Write what Megatron reads first, and bring everything to the disk."""
        self._end_file()
        # after all pieces, since it says where they are: a folder without it is no checkpoint
        metadata = Metadata(
            state_dict_metadata=self._metadata, storage_data=self._places, storage_meta=StorageMeta()
        )
        with self._new_file(METADATA_NAME) as stream:
            pickle.dump(metadata, stream)
        # there is no common data, but Megatron opens the file
        with self._new_file(COMMON_NAME) as stream:
            torch.save({}, cast(IO[bytes], stream))
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
        with (self.folder / CONFIG_NAME).open("rb") as file:
            content = file.read()
        self.files[CONFIG_NAME] = {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"}

    def _put(self, index: MetadataIndex, content: Tensor | list[None]) -> None:
        """Append a piece to the current file, or to a new one, and note its place."""
        if self._stream is not None and self._stream.size >= self.max_file_bytes:
            self._end_file()
        if self._stream is None:
            self._stream = self._new_file(
                f"__0_{sum(name.endswith('.distcp') for name in self.files)}.distcp"
            )
        begin = self._stream.size
        torch.save(content, cast(IO[bytes], self._stream))
        self._places[index] = _StorageInfo(self._stream.name, begin, self._stream.size - begin)

    def _end_file(self) -> None:
        """Close the current file, which brings it to the disk."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _new_file(self, name: str) -> "_CountingFile":
        """Begin a file, which enters itself into `files` at its end."""
        return _CountingFile(self.folder / name, self.files)


class _CountingFile(io.RawIOBase):
    """Count and checksum what is appended to a file; enter both into `files` when it is closed."""

    def __init__(self, path: Path, files: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.name, self.size, self._crc = path.name, 0, 0
        self._files, self._file = files, path.open("wb")

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        count = self._file.write(data)
        self.size += count
        self._crc = zlib.crc32(data, self._crc)
        return count

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._files[self.name] = {"size": self.size, "crc32": f"{self._crc:08x}"}
        super().close()


class ShardedReader:
    """Read rows of a checkpoint's tensors, in whatever boxes they were written, and nothing else.

    Raises:
        ValueError: one line, if `.metadata` is not of a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata: Metadata = read_metadata(folder)
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        entries = metadata.state_dict_metadata.items()
        self._tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._first_bytes: dict[MetadataIndex, int] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by key."""
        return {key: tuple(entry.size) for key, entry in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Return the type that a tensor is stored in."""
        return self._tensors[key].properties.dtype

    def rows(self, key: str, first: int, count: int) -> Tensor:
        """Read rows of a tensor [R] or [R, C], or of one expert of [E, R, C], rows counted over the experts.

        Example: of [2, 3, C], first=4 and count=2 are rows 1 and 2 of expert 1.

        Args:
            key: of the tensor.
            first: first row.
            count: rows, all of one expert.

        Returns:
            [count] or [count, C], of the stored type, on the CPU.

        Raises:
            ValueError: one line, if a file ends too early or a tensor is not stored row by row.
            OSError: if a file cannot be read.
        """
        entry = self._tensors[key]
        _, num_rows, columns = _lifted(entry.size, 1)
        expert, row = divmod(first, num_rows)
        out = torch.empty((count, columns), dtype=entry.properties.dtype)
        filled = 0
        for number, chunk in enumerate(entry.chunks):
            at, size = _lifted(chunk.offsets, 0), _lifted(chunk.sizes, 1)
            # the rows that this box shares with the wanted ones
            begin, end = max(row, at[1]), min(row + count, at[1] + size[1])
            if begin >= end or not at[0] <= expert < at[0] + size[0]:
                continue
            target = out[begin - row : end - row, at[2] : at[2] + size[2]]
            skipped = (expert - at[0]) * size[1] + begin - at[1]
            self._read(MetadataIndex(key, chunk.offsets, number), skipped, target)
            filled += target.numel()
        assert filled == out.numel(), f"{key}: the checkpoint holds {filled} of {out.numel()} numbers"
        return out if len(entry.size) > 1 else out.view(-1)

    def _read(self, index: MetadataIndex, row: int, out: Tensor) -> None:
        """Fill `out`, [rows, columns of the box], from `row` of a box on, counted over its experts."""
        # straight to their place, unless the box is narrower than the tensor and leaves gaps there
        rows = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
        with (self.folder / self._places[index].relative_path).open("rb") as file:
            if index not in self._first_bytes:
                self._first_bytes[index] = first_byte(file, self._places[index])
            file.seek(self._first_bytes[index] + row * out.shape[1] * out.element_size())
            data = rows.view(-1).view(torch.uint8).numpy().data
            if file.readinto(data) != len(data):
                raise ValueError(f"{file.name}: ends too early; use another checkpoint")
        if rows is not out:
            out.copy_(rows)


class _Window(io.RawIOBase):
    """Show part of a file as a file of its own, for reading."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def first_byte(file: IO[bytes], place: _StorageInfo) -> int:
    """Find where a stored tensor's numbers begin in its file.

    torch.save writes a zip archive that is not compressed, so a few rows of a piece of gigabytes are read
    with one seek.

    Raises:
        ValueError: one line, if the tensor is not stored row by row.
    """
    view = cast(IO[bytes], _Window(file, place.offset, place.length))
    # on the meta device there are no numbers to read
    tensor: Tensor = torch.load(view, map_location="meta", weights_only=True)
    with zipfile.ZipFile(view) as archive:
        entry = next(one for one in archive.infolist() if one.filename.endswith("/data/0"))
    if not tensor.is_contiguous() or entry.file_size != tensor.nbytes or entry.compress_type:
        raise ValueError(f"{file.name}: a tensor is not stored row by row; use a checkpoint of msa-train")
    # fixed part of the entry's header, whose last two numbers are the lengths of what follows it
    header = 30
    view.seek(entry.header_offset)
    name_length, extra_length = struct.unpack("<HH", view.read(header)[-4:])
    return place.offset + entry.header_offset + header + name_length + extra_length


def _lifted(sizes: Sequence[int], filler: int) -> tuple[int, int, int]:
    """Lift sizes or offsets of [R], [R, C] or [E, R, C] to experts x rows x columns.

    Example: sizes (4, 8) with filler 1 -> (1, 4, 8); offsets (5,) with filler 0 -> (0, 5, 0).
    """
    if len(sizes) == 3:
        return sizes[0], sizes[1], sizes[2]
    return filler, sizes[0], sizes[1] if len(sizes) == 2 else filler

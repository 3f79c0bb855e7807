"""Copy what one rank writes to a checkpoint into host memory, while the training stands still.

Takes as much host memory as the rank writes and not more, in one piece that is kept for the whole run: 23 GB
for m3 on 256 ranks, see `save`. From a GPU it is locked memory. Nothing is allocated on the GPU but a piece
of what is not contiguous there, 64 MiB at a time, or of what is made only now, see `deferred`.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch import Tensor

from msa_train.checkpoint.torch_dist.writer import Shards

# of tensors in the buffer, a multiple of any element
_ALIGNED = 16
_PIECE_BYTES = 64 * 2**20


@dataclass(slots=True)
class StagedState:
    """Hold what this rank writes."""

    shards: Shards
    "by key, their tensors on the host"
    common: dict[str, Any]
    "plain data, which rank 0 writes"
    num_bytes: int
    "of this rank's tensors, in the files"


def deferred(
    shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[int, int], Tensor], *, turn: int = 0
) -> Tensor:
    """Make a tensor that gets values when it is copied, of what is kept in another form than it is stored.

    It may be cut, viewed and put into shards as any other: a piece of memory that is not there.

    Args:
        shape, dtype: of the values.
        read: returns elements [begin, end) of the flat tensor, on any device.
        turn: tensors with a lower one are read before it, whatever they are called; for what is in files.

    Example: moments in fp8, stored in fp32: deferred((n,), torch.float32, lambda begin, end: ...).
    """
    made = torch.empty(shape, dtype=dtype, device="meta")
    storage: Any = made.untyped_storage()
    storage.read_values, storage.turn = read, turn
    return made


class HostStager:
    """Take copies, each into the memory of the one before it, which must no longer be in use.

    New memory costs more time than the copy itself: its pages are made when they are first written, and those
    that a GPU copies to are locked.
    """

    def __init__(self, make_buffer: Callable[[int], Tensor] | None = None) -> None:
        """Begin without a buffer.

        Args:
            make_buffer: makes one of so many bytes, [n] of uint8; None: in host memory.
        """
        self._make_buffer = make_buffer
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._is_locked = False

    @property
    def num_bytes(self) -> int:
        """Return the host memory that is kept."""
        return self._buffer.nbytes

    def stage(self, shards: Shards, common: dict[str, Any]) -> StagedState:
        """Copy everything; shards that share memory share their copy.

        Args:
            shards: what this rank writes, by key, wherever its tensors are.
            common: plain data.
        """
        found = {_view_of(tensor): tensor for _, tensor in tensors_of(shards)}
        sources = dict(sorted(found.items(), key=lambda item: _turn_of(item[1])))
        on_gpu = any(source.is_cuda for source in sources.values())
        self._reserve(sum(_padded(source.nbytes) for source in sources.values()), locked=on_gpu)
        taken: dict[tuple[Any, ...], Tensor] = {}
        at = 0
        for view, source in sources.items():
            taken[view] = self._copy(source, at)
            at += _padded(source.nbytes)
        # Copies from a GPU are queued without waiting for each; the update of the next step must not begin
        # before they are done.
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        copies: Shards = {
            key: [
                replace(entry, data=copy.deepcopy(entry.data))
                if isinstance(entry, ShardedObject)
                else replace(entry, data=taken[_view_of(_data(entry))])
                for entry in entries
            ]
            for key, entries in shards.items()
        }
        # the same tensor under two names is written twice
        written = sum(tensor.nbytes for _, tensor in tensors_of(copies))
        return StagedState(copies, copy.deepcopy(common), written)

    def _reserve(self, num_bytes: int, *, locked: bool) -> None:
        """Make the buffer, at the first save or where it has become too small."""
        enough = num_bytes <= self._buffer.nbytes
        if enough and (locked <= self._is_locked or self._make_buffer is not None):
            return
        if self._is_locked:
            _cudart().cudaHostUnregister(self._buffer.data_ptr())
        # the old one first: both at once would be twice the share
        self._buffer = torch.empty(0, dtype=torch.uint8)
        if self._make_buffer is not None:
            self._buffer = self._make_buffer(num_bytes)
            return
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        # PyTorch's own locked memory is rounded up to powers of two: 23 GB would be 32
        self._is_locked = locked and _lock(self._buffer)

    def _copy(self, source: Tensor, at: int) -> Tensor:
        """Copy one tensor to its place in the buffer, in its own type."""
        place = self._buffer[at : at + source.nbytes].view(source.dtype).view(source.shape)
        if source.is_meta:
            _make(source, place)
            return place
        is_queued = source.is_cuda and self._is_locked
        if source.is_contiguous() or not source.dim():
            return place.copy_(source, non_blocking=is_queued)
        # the copy makes it contiguous on its device first
        rows = max(1, _PIECE_BYTES * source.shape[0] // max(source.nbytes, 1))
        for into, piece in zip(place.split(rows), source.split(rows), strict=True):
            into.copy_(piece, non_blocking=is_queued)
        return place


def _turn_of(source: Tensor) -> int:
    return source.untyped_storage().turn if source.is_meta else 0  # type: ignore[attr-defined]


def _make(source: Tensor, place: Tensor) -> None:
    """Fill a place with the values of a view of a `deferred` tensor, some at a time."""
    if not source.is_contiguous():
        for row, into in zip(source.unbind(), place.unbind(), strict=True):
            _make(row, into)
        return
    read: Callable[[int, int], Tensor] = source.untyped_storage().read_values  # type: ignore[attr-defined]
    flat, first = place.view(-1), int(source.storage_offset())
    step = _PIECE_BYTES // flat.element_size()
    for begin in range(0, flat.numel(), step):
        end = min(begin + step, flat.numel())
        flat[begin:end].copy_(read(first + begin, first + end))


def _lock(buffer: Tensor) -> bool:
    """Lock memory for copies from a GPU; tell whether that worked. Slower copies are right as well."""
    if not buffer.nbytes:
        return False
    return int(_cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)) == 0


def _cudart() -> Any:
    """Return CUDA's runtime, which torch hands out untyped."""
    return torch.cuda.cudart()


def tensors_of(shards: Shards) -> Iterator[tuple[str, Tensor]]:
    """Yield key and data of every tensor, where they are."""
    for key, entries in shards.items():
        for entry in entries:
            if isinstance(entry, ShardedTensor):
                yield key, _data(entry)


def _view_of(source: Tensor) -> tuple[Any, ...]:
    """Tell views of memory apart: equal for tensors that hold the same by their place."""
    storage = source.untyped_storage()._cdata
    return storage, source.storage_offset(), tuple(source.shape), source.stride(), source.dtype


def _padded(num_bytes: int) -> int:
    """Round up to where the next tensor may begin."""
    return -(-num_bytes // _ALIGNED) * _ALIGNED


def _data(entry: ShardedTensor) -> Tensor:
    """Return the tensor of a shard, which must have one."""
    assert entry.data is not None, f"{entry.key} has no data to save"
    return entry.data.detach()

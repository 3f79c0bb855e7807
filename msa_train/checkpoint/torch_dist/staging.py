"""Copy what one rank writes to a checkpoint into host memory, while the training stands still.

Takes as much host memory as the rank writes, for the whole run: with ep 64 on 256 ranks, a rank of m3 that
writes experts keeps 90 GB, see `save`. From a GPU it is pinned memory.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch import Tensor

from msa_train.checkpoint.torch_dist.writer import Shards


@dataclass(slots=True)
class StagedState:
    """Hold what this rank writes."""

    shards: Shards
    "by key, their tensors on the host"
    common: dict[str, Any]
    "plain data, which rank 0 writes"
    num_bytes: int
    "of this rank's tensors, in the files"


class HostStager:
    """Take copies, each into the memory of the one before it, which must no longer be in use.

    New memory costs more time than the copy itself: its pages are made when they are first written, and those
    that a GPU copies to are locked.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def stage(self, shards: Shards, common: dict[str, Any]) -> StagedState:
        """Copy everything; shards that share memory share their copy.

        Args:
            shards: what this rank writes, by key, wherever its tensors are.
            common: plain data.
        """
        taken: dict[tuple[Any, ...], Tensor] = {}
        copies: Shards = {}
        on_gpu = False
        for key, entries in shards.items():
            copies[key] = []
            for entry in entries:
                if isinstance(entry, ShardedObject):
                    copies[key].append(replace(entry, data=copy.deepcopy(entry.data)))
                    continue
                source = _data(entry)
                on_gpu |= source.is_cuda
                view = (source.data_ptr(), tuple(source.shape), source.stride(), source.dtype)
                if view not in taken or not source.numel():
                    taken[view] = self._copy((key, tuple(entry.global_offset)), source)
                copies[key].append(replace(entry, data=taken[view]))
        # Copies from a GPU are queued without waiting for each; the update of the next step must not begin
        # before they are done.
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        # the same tensor under two names is written twice
        written = sum(_data(e).nbytes for es in copies.values() for e in es if isinstance(e, ShardedTensor))
        return StagedState(copies, copy.deepcopy(common), written)

    def _copy(self, place: tuple[str, tuple[int, ...]], source: Tensor) -> Tensor:
        """Copy one tensor into the buffer of its place (key and offset), which is made at the first save."""
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[place] = buffer
        return buffer.copy_(source, non_blocking=source.is_cuda)


def tensors_of(shards: Shards) -> Iterator[tuple[str, Tensor]]:
    """Yield key and data of every tensor, where they are."""
    for key, entries in shards.items():
        for entry in entries:
            if isinstance(entry, ShardedTensor):
                yield key, _data(entry)


def _data(entry: ShardedTensor) -> Tensor:
    """Return the tensor of a shard, which must have one."""
    assert entry.data is not None, f"{entry.key} has no data to save"
    return entry.data.detach()

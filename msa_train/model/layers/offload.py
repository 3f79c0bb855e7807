"""Keep what a layer saves for its backward pass in host memory, and bring it back one layer ahead.

A layer runs within `OffloadedLayer`, whose hooks see every tensor that autograd saves. Large ones are copied
to pinned host memory on a stream of their own while the layer goes on computing. In the backward pass the
first tensor that a layer asks for starts the copies of the layer before it in the same micro-batch, so that
they travel while this one is computed. A device that is no GPU runs the same code without streams.

On the device there are at most: tensors of two layers on their way out (the third waits for the first), those
of two layers that came back, and what is smaller than `MIN_BYTES`. On the host a buffer goes back to a pool
when its tensor has been used, and serves the next one of its size.

Cost for m3_1m by arithmetic (256 ranks, 4 stages of 15 layers, T = 16,384 tokens, H = 6,144, bf16): with
recompute=full 192 MiB a layer out and back, 4 ms each at 50 GB/s; 2.8 GiB of device memory less for each of
up to 4 micro-batches in flight, and as much host memory more: 90 GiB on a node of 8. Nothing hides the first
layer that a micro-batch brings back to a stage.
"""

from __future__ import annotations

import weakref
from collections import deque
from functools import cache
from typing import Any

import torch
from torch import Tensor

from msa_train.model.layers.copy_stream import CopyStream, copy_stream

# Smaller tensors stay: their copies would cost more than their memory.
MIN_BYTES = 2**20
# layers whose tensors are still on their way out
_LEAVING_LAYERS = 2


class OffloadChain:
    """Order the layers of one micro-batch on this rank, so that each knows which one comes before."""

    def __init__(self) -> None:
        self.last: OffloadedLayer | None = None
        "the latest layer that ran"


class OffloadedLayer:
    """Take in what one call of a layer saves; `pack` and `unpack` are hooks for autograd.

    Lives as long as one of its tensors, or a later layer of its micro-batch, is needed.
    """

    def __init__(self, chain: OffloadChain, stays: set[int], device: torch.device) -> None:
        """Begin the call; `stays` are storages (`storage_of`) of tensors that are kept elsewhere anyway."""
        self.previous, chain.last = chain.last, self
        self.store = _store(device)
        self._stays = stays
        self._handles: list[weakref.ref[_Handle]] = []
        self._seen: dict[tuple[Any, ...], _Handle] = {}
        self._leaving: list[Tensor] = []
        self._is_fetched = False

    def pack(self, tensor: Tensor) -> Tensor | _Handle:
        """Send a tensor to the host and return what brings it back; small and shared ones stay."""
        if not _is_worth_it(tensor) or storage_of(tensor) in self._stays:
            return tensor
        # several operators save the same tensor; it stays alive until the layer has ended
        place = (storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        handle = self._seen.get(place)
        if handle is None:
            handle = self._seen[place] = _Handle(self, tensor)
            self._handles.append(weakref.ref(handle))
            self._leaving.append(tensor.detach())
        handle.uses += 1
        return handle

    def end(self) -> None:
        """End the forward pass of the layer: its tensors leave the device once they have been copied."""
        self._seen.clear()
        self.store.leave(self._leaving)
        self._leaving = []

    def unpack(self, packed: Tensor | _Handle) -> Tensor:
        """Return the tensor on the device; what the previous layer keeps starts on its way back."""
        if isinstance(packed, Tensor):
            return packed
        self.fetch()
        if self.previous is not None:
            self.previous.fetch()
        return packed.take()

    def fetch(self) -> None:
        """Start to bring everything back, once."""
        if not self._is_fetched:
            self._is_fetched = True
            for reference in self._handles:
                handle = reference()
                if handle is not None:
                    handle.fetch()


class _Handle:
    """Stand for a tensor that is in host memory."""

    def __init__(self, layer: OffloadedLayer, tensor: Tensor) -> None:
        self.uses = 0
        "how often it was saved and has not been asked for yet"
        self._layer = layer
        self._like = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        self._here: Tensor | None = None
        self._mark: Any = None
        self._buffer = layer.store.send(tensor)

    def fetch(self) -> None:
        """Start to bring it back."""
        if self._here is None:
            shape, stride, dtype, device = self._like
            self._here, self._mark = self._layer.store.bring(self._buffer, shape, stride, dtype, device)

    def take(self) -> Tensor:
        """Return it, once the device has it for everything that the current stream does from here on."""
        self.fetch()
        here = self._here
        assert here is not None, "fetched"
        self._layer.store.stream.use(here, self._mark)
        self.uses -= 1
        if self.uses <= 0:
            # autograd has it now, and lets it go after the operator
            self._here = None
        return here

    def __del__(self) -> None:
        self._layer.store.free(self._buffer)


class _Store:
    """Own the copy stream and the pinned buffers of a device."""

    def __init__(self, device: torch.device) -> None:
        self.stream: CopyStream = copy_stream(device)
        self._free: dict[int, list[Tensor]] = {}
        self._leaving: deque[tuple[Any, list[Tensor]]] = deque()

    def send(self, tensor: Tensor) -> Tensor:
        """Copy to a host buffer of as many bytes, behind what the current stream has been given."""
        num_bytes = tensor.numel() * tensor.element_size()
        free = self._free.get(num_bytes)
        # The copies of a buffer follow one another on one stream, so one that was given back is safe to fill.
        buffer = free.pop() if free else self.stream.host_buffer(num_bytes)
        with self.stream.behind_current():
            _shaped(buffer, tensor.shape, tensor.stride(), tensor.dtype).copy_(tensor, non_blocking=True)
        return buffer

    def bring(
        self, buffer: Tensor, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: Any
    ) -> tuple[Tensor, Any]:
        """Copy back beside what the current stream does; return the tensor and the mark of its arrival."""
        with self.stream.alone():
            here = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            here.copy_(_shaped(buffer, shape, stride, dtype), non_blocking=True)
        return here, self.stream.mark()

    def leave(self, tensors: list[Tensor]) -> None:
        """Hold tensors until they are copied, of two layers at most; for older ones the device waits."""
        self._leaving.append((self.stream.mark(), tensors))
        while len(self._leaving) > _LEAVING_LAYERS:
            mark, _ = self._leaving.popleft()
            self.stream.wait_for(mark)

    def free(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        self._free.setdefault(buffer.numel(), []).append(buffer)


@cache
def _store(device: torch.device) -> _Store:
    return _Store(device)


def storage_of(tensor: Tensor) -> int:
    """Name the memory that a tensor and its views share; tensors without data have one too."""
    return tensor.untyped_storage()._cdata


def _shaped(buffer: Tensor, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """View a buffer of bytes as a dense tensor."""
    return buffer.view(dtype).as_strided(shape, stride)


def _is_worth_it(tensor: Tensor) -> bool:
    """Tell whether a saved tensor is numbers, large, and dense, whatever the order of its dimensions."""
    if not tensor.is_floating_point() or tensor.numel() * tensor.element_size() < max(MIN_BYTES, 1):
        return False
    return torch.ops.aten.is_non_overlapping_and_dense(tensor)

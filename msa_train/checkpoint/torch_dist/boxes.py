"""Cut tensors into boxes: parts of a checkpoint's tensor that one rank writes or reads.

Optimizers and even shares cut a tensor anywhere in its flat order, the files know boxes only. A range of a
matrix is at most three boxes: the end of one row, whole rows, the begin of another.

Example: elements 3 to 11 of a matrix [4, 5]

    . . . 3 4        box at (0, 3) of [1, 2]
    5 6 7 8 9        box at (1, 0) of [1, 5]
    10 11 . .        box at (2, 0) of [1, 2]

Boxes are Megatron's ShardedTensors without a regular grid, which its planners and PyTorch's take as they are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """Hold the place of a box in a tensor."""

    offsets: Shape
    "first element in each dimension"
    sizes: Shape
    "elements in each dimension"

    def of(self, tensor: Tensor) -> Tensor:
        """Return the box of a tensor, a view."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            tensor = tensor.narrow(dim, offset, size)
        return tensor


def row_major(shape: Sequence[int]) -> Shape:
    """Return the strides of a contiguous tensor: (2, 3, 4) -> (12, 4, 1)."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def range_boxes(shape: Sequence[int], strides: Sequence[int], begin: int, end: int) -> list[Box]:
    """Cut the part of a view that lies in a range of memory into boxes, in the order of memory.

    Two for each dimension but the last, and one more, at most: three for a matrix, five for [E, R, C].

    Args:
        shape, strides: of the view, in any order of dimensions; no two elements may share a place.
        begin, end: places, counted from the view's first element; those outside of it are left out.

    Example: (4, 5), (5, 1), 3, 12 -> the three boxes above. (4,), (1,), 1, 3 -> one of [2] at (1,).
    """
    if 0 in shape:
        return []
    dims = sorted((dim for dim, size in enumerate(shape) if size > 1), key=lambda dim: -strides[dim])
    # places from the first to the last element of what the dimensions from this one on leave
    spans = [
        1 + sum((shape[dim] - 1) * strides[dim] for dim in dims[place:]) for place in range(len(dims) + 1)
    ]
    assert all(strides[dim] >= spans[place + 1] for place, dim in enumerate(dims)), f"{shape} {strides}"

    def walk(place: int, offsets: dict[int, int], at: int) -> Iterator[Box]:
        """Yield the boxes of what lies at `at`, with the dimensions before `place` fixed."""
        if at >= end or at + spans[place] <= begin:
            return
        if place == len(dims):
            yield _box(shape, offsets)
            return
        dim, stride, span = dims[place], strides[dims[place]], spans[place + 1]
        first = min(max(0, -((at - begin) // stride)), shape[dim])
        stop = max(0, min((end - at - span) // stride + 1, shape[dim]))
        # slabs that are cut, before and after those that are whole; one and the same in a short range
        if first > 0:
            yield from walk(place + 1, offsets | {dim: first - 1}, at + (first - 1) * stride)
        if first < stop:
            yield _box(shape, offsets, dim, first, stop - first)
        if stop < shape[dim] and stop >= first:
            yield from walk(place + 1, offsets | {dim: stop}, at + stop * stride)

    return list(walk(0, {}, 0))


def _box(shape: Sequence[int], fixed: dict[int, int], dim: int = -1, offset: int = 0, size: int = 0) -> Box:
    """Make a box: one element of fixed dimensions, a range of `dim`, all of the others."""
    offsets, sizes = (
        [fixed.get(d, 0) for d in range(len(shape))],
        [1 if d in fixed else n for d, n in enumerate(shape)],
    )
    if dim >= 0:
        offsets[dim], sizes[dim] = offset, size
    return Box(tuple(offsets), tuple(sizes))


def box_of(entry: ShardedTensor, box: Box, data: Tensor) -> ShardedTensor:
    """Describe a box of a shard by its place in the whole tensor.

    Args:
        entry: the shard.
        box: in the shard's own dimensions.
        data: content of the box, with its shape.
    """
    lead = entry.prepend_axis_num
    own = entry.global_offset[lead:]
    return replace(
        entry,
        data=data[(None,) * lead] if lead else data,
        dtype=data.dtype,
        local_shape=(1,) * lead + box.sizes,
        global_offset=(*entry.global_offset[:lead], *(a + b for a, b in zip(own, box.offsets, strict=True))),
        axis_fragmentations=None,
        prepend_axis_num=0,
    )


def range_of(entry: ShardedTensor, begin: int, end: int) -> list[ShardedTensor]:
    """Cut elements [begin, end) of a shard, in the order of its rows, into boxes; their data are views."""
    assert entry.data is not None, f"{entry.key} has no data"
    shape = tuple(entry.data.shape)
    boxes = range_boxes(shape, row_major(shape), begin, end)
    return [box_of(entry, box, box.of(entry.data.detach())) for box in boxes]


def flat_boxes(
    entry: ShardedTensor | ShardedTensorFactory, key: str, flat: Tensor, begin: int
) -> list[ShardedTensor]:
    """Describe a flat range of a parameter as boxes of a tensor that is cut as the parameter is.

    Nothing is copied and nothing exchanged: the data of the boxes are views of `flat`.

    Args:
        entry: of the whole parameter on this rank; factories cut it further, into views.
        key: of the tensor that the range is a part of.
        flat: [n], elements begin to begin + n of the parameter, any dtype and device.
        begin: first element.

    Raises:
        ValueError: a factory that copies the parameter, so that no box is a view of `flat`.
    """
    whole = torch.empty(tuple(entry.data.shape), dtype=flat.dtype, device="meta")  # type: ignore[union-attr]
    # what is not there tells where each part lies in memory
    if isinstance(entry, ShardedTensorFactory):
        built: Any = replace(entry, key=key, data=whole).build()
        parts = [built] if isinstance(built, ShardedTensor) else list(nested_values(built))
    else:
        parts = [replace(entry, key=key, data=whole, dtype=flat.dtype)]
    return [box for part in parts for box in _boxes_of_part(part, whole, flat.detach(), begin)]


def _boxes_of_part(part: Any, whole: Tensor, flat: Tensor, begin: int) -> Iterator[ShardedTensor]:
    """Yield the boxes of one part, a view of `whole`."""
    view: Tensor = part.data
    if view.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        raise ValueError(f"{part.key}: its parts are no views of the parameter, so they cannot be cut")
    place = int(view.storage_offset())
    strides = view.stride()
    for box in range_boxes(tuple(view.shape), strides, begin - place, begin + flat.numel() - place):
        first = place + sum(a * b for a, b in zip(box.offsets, strides, strict=True))
        data = flat.as_strided(box.sizes, strides, first - begin + int(flat.storage_offset()))
        yield box_of(part, box, data)

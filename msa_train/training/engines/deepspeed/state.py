"""List and take over the state of DeepSpeed's engine in the toolkit's own checkpoint format.

Each rank lists the ranges of fp32 weights and moments that it owns, as boxes under the name and shape of
their parameters; with ZeRO-3 its slices of the model's weights as well, which other stages hold whole. So
nothing is gathered, no rank holds more than its share, and the files are those of any other engine, layout
and stage. DeepSpeed's own checkpoints need the same number of ranks, and lack experts that are not its own.

By arithmetic for a dense model of 70B parameters on 256 ranks with ZeRO-3: 3.8 GB of each rank, of each of
its 640 parameters one range, at most 3 boxes, 4 tensors of all. Loading with ZeRO-1 or 2 ends with one
all-gather of the model's weights, as after each update. What is offloaded to NVMe takes no memory here
either: it is read when it is copied, and read into files, see `swapped_states`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from msa_train.checkpoint.torch_dist.boxes import flat_boxes
from msa_train.checkpoint.torch_dist.format_versions import STATE_PREFIX
from msa_train.model.gpt import MsaGptModel
from msa_train.parallel.process_groups import Groups
from msa_train.training.engines.deepspeed.partitions import (
    Owned,
    is_partitioned,
    opened,
    owned,
    set_updates,
    slice_of,
)
from msa_train.training.engines.deepspeed.swapped_states import SwappedStates
from msa_train.training.engines.engine import checkpoint_metadata

_Entry = ShardedTensor | ShardedTensorFactory
_Boxes = list[ShardedTensor]


class HasDeepSpeed(Protocol):
    """Have what is needed of an engine."""

    @property
    def chunks(self) -> Sequence[MsaGptModel]:
        """Return the model, one part."""
        ...

    @property
    def groups(self) -> Groups:
        """Return the process groups."""
        ...

    @property
    def engine(self) -> Any:
        """Return DeepSpeed's engine."""
        ...

    @property
    def files(self) -> SwappedStates | None:
        """Return what is in files, with offload to NVMe."""
        ...


def sharded_state(engine: HasDeepSpeed, loading: bool) -> dict[str, Any]:
    """List model and optimizer as Megatron sharded tensors; see TrainEngine.sharded_state.

    Args:
        engine: of any stage of ZeRO.
        loading: to be read into; weights that are the model's own get memory beside them, since both are
            read and the optimizer's may be more exact.

    Returns:
        "model": by name, whole entries, or with ZeRO-3 the boxes of this rank's slices. "optimizer": boxes by
        number of the range and name of the state. Views of DeepSpeed's own tensors.
    """
    (model,) = engine.chunks
    with _whole_shapes(model):
        state = _listed(engine)
        entries: dict[int, _Entry] = {
            id(entry.data): entry for entry in nested_values(state) if isinstance(entry, _Entry)
        }
        beside = _Beside(engine.files) if loading else None
        optimizer = {
            str(number): _state_boxes(entries[id(part.parameter)], part, beside)
            for number, part in enumerate(owned(engine.engine.optimizer, engine.files))
        }
        parts = {key: _own_part(entry, engine.files, beside) for key, entry in state.items()}
        # an empty list would be taken for plain data
        return {"model": {key: part for key, part in parts.items() if part != []}, "optimizer": optimizer}


def _listed(engine: HasDeepSpeed) -> dict[str, Any]:
    """List the whole parameters of the model."""
    (model,) = engine.chunks
    return model.sharded_state_dict(metadata=checkpoint_metadata(engine.groups))


def _keys_by_parameter(engine: HasDeepSpeed) -> dict[int, str]:
    """Find under which key of the model's state each parameter is."""
    (model,) = engine.chunks
    with _whole_shapes(model):
        return {id(entry.data): key for key, entry in _listed(engine).items() if isinstance(entry, _Entry)}


@torch.no_grad()
def load_state(engine: HasDeepSpeed, state: dict[str, Any], updates: int) -> None:
    """Take over what was loaded into `sharded_state(loading=True)`; see TrainEngine.load_state.

    The model's weights become what the fp32 weights round to, whatever precision wrote the checkpoint.
    """
    wrapper = engine.engine.optimizer
    with _partitioned(wrapper, engine.files):
        places = sharded_state(engine, False)
        _take_model(engine, places["model"], state["model"])
        for number, part in enumerate(opened(wrapper, engine.files)):
            for name, boxes in places["optimizer"][str(number)].items():
                _take_boxes(_moved(boxes, part.state[name]), state["optimizer"][str(number)][name])
            if not part.weights.is_meta:
                part.weights.copy_(part.state["fp32_param"])
        set_updates(wrapper, updates)
    if hasattr(wrapper, "update_lp_params"):
        # ZeRO-1 and 2: the other ranks' ranges of the weights
        wrapper.update_lp_params()


@torch.no_grad()
def load_weights(engine: HasDeepSpeed, state: dict[str, Any]) -> None:
    """Take over the model part of a state alone; see TrainEngine.load_weights."""
    wrapper = engine.engine.optimizer
    with _partitioned(wrapper, engine.files):
        places = sharded_state(engine, False)["model"]
        _take_model(engine, places, state)
        keys = _keys_by_parameter(engine)
        for part in opened(wrapper, engine.files):
            fp32 = part.state["fp32_param"]
            if not part.weights.is_meta:
                fp32.copy_(part.weights)
                continue
            key = keys[id(part.parameter)]
            if state.get(key):
                _take_boxes(_moved(places[key], fp32), state[key])


@contextmanager
def _whole_shapes(model: nn.Module) -> Iterator[None]:
    """Give parameters that ZeRO-3 has cut the shapes that they have, for a while and without memory."""
    cut: list[Any] = [parameter for parameter in model.parameters() if is_partitioned(parameter)]
    kept = [parameter.data for parameter in cut]
    for parameter in cut:
        parameter.data = parameter.data.new_empty(1).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter, data in zip(cut, kept, strict=True):
            parameter.data = data


@contextmanager
def _partitioned(wrapper: Any, files: SwappedStates | None) -> Iterator[None]:
    """Let ZeRO-3 drop the weights that it has gathered, and gather afterwards those that it always keeps."""
    is_zero3 = hasattr(wrapper, "fp32_partitioned_groups_flat")
    if is_zero3:
        wrapper.checkpoint_event_prologue()
        if files is not None:
            files.drop_prefetched()
    yield
    if is_zero3:
        wrapper.checkpoint_event_epilogue()


class _Beside:
    """Make places for what cannot be read in place: in memory, or in files where that is in files."""

    def __init__(self, files: SwappedStates | None) -> None:
        self._files = files

    def of(self, kept: Tensor) -> Tensor:
        """Make a place for a flat tensor."""
        if kept.is_meta and self._files is not None:
            return self._files.folder.empty(kept.numel(), kept.dtype)
        return torch.empty_like(kept)


def _own_part(entry: Any, files: SwappedStates | None, beside: _Beside | None) -> Any:
    """Return the boxes of this rank's slice of a parameter that is cut; anything else as it is."""
    if not isinstance(entry, _Entry) or not is_partitioned(entry.data):  # type: ignore[arg-type]
        return entry
    begin, kept = slice_of(entry.data, files)
    if kept.is_meta and beside is not None:
        kept = beside.of(kept)
    return flat_boxes(entry, entry.key, kept, begin)


def _state_boxes(entry: _Entry, part: Owned, beside: _Beside | None) -> dict[str, _Boxes]:
    """List the boxes of one range of fp32 weights and moments."""
    models_own = part.weights.untyped_storage()._cdata
    boxes: dict[str, _Boxes] = {}
    for name, kept in part.state.items():
        is_apart = kept.is_meta or kept.untyped_storage()._cdata == models_own
        flat = beside.of(kept) if beside is not None and is_apart else kept
        boxes[name] = flat_boxes(entry, f"{STATE_PREFIX}.{name}.{entry.key}", flat, part.begin)
    return boxes


def _moved(boxes: _Boxes, flat: Tensor) -> _Boxes:
    """Return boxes of a range with the data of another tensor in its place: [n], as `flat_boxes` got."""
    if not boxes or not boxes[0].data.is_meta:  # type: ignore[union-attr]
        return boxes
    first = min(int(box.data.storage_offset()) for box in boxes)  # type: ignore[union-attr]
    return [
        replace(
            box,
            dtype=flat.dtype,
            data=flat.as_strided(
                box.data.shape,  # type: ignore[union-attr]
                box.data.stride(),  # type: ignore[union-attr]
                int(box.data.storage_offset()) - first + int(flat.storage_offset()),  # type: ignore[union-attr]
            ),
        )
        for box in boxes
    ]


def _take_model(engine: HasDeepSpeed, places: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Copy loaded weights to the model; what is lacking keeps its value."""
    whole: dict[str, Any] = {}
    for key, value in loaded.items():
        place = places[key]
        # a box that was lacking is not in its list any more, and then no other of its tensor is
        if not isinstance(place, list):
            whole[key] = value
        elif value and not place[0].data.is_meta:
            # what is in files follows from the fp32 weights
            _take_boxes(place, value)
    (model,) = engine.chunks
    model.load_state_dict(whole, strict=False)


def _take_boxes(places: _Boxes, loaded: Sequence[Tensor]) -> None:
    """Copy what was not read in place."""
    for place, tensor in zip(places, loaded, strict=True):
        assert place.data is not None, f"{place.key} has no place"
        if tensor.data_ptr() != place.data.data_ptr():
            place.data.copy_(tensor)

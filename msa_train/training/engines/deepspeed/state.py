"""List and take over the state of DeepSpeed's engine in the toolkit's own checkpoint format.

Each rank lists the ranges of fp32 weights and moments that it owns, as boxes under the name and shape of
their parameters; with ZeRO-3 its slices of the model's weights as well, which other stages hold whole. So
nothing is gathered, no rank holds more than its share, and the files are those of any other engine, layout
and stage. DeepSpeed's own checkpoints need the same number of ranks, and lack experts that are not its own.

By arithmetic for a dense model of 70B parameters on 256 ranks with ZeRO-3: 3.8 GB of each rank, of each of
its 640 parameters one range, at most 3 boxes, 4 tensors of all. Loading with ZeRO-1 or 2 ends with one
all-gather of the model's weights, as after each update.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    owned,
    set_updates,
    slice_of,
)
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
        state: dict[str, Any] = model.sharded_state_dict(metadata=checkpoint_metadata(engine.groups))
        entries: dict[int, _Entry] = {
            id(entry.data): entry for entry in nested_values(state) if isinstance(entry, _Entry)
        }
        optimizer = {
            str(number): _state_boxes(entries[id(part.parameter)], part, loading=loading)
            for number, part in enumerate(owned(engine.engine.optimizer))
        }
        parts = {key: _own_part(entry) for key, entry in state.items()}
        # an empty list would be taken for plain data
        return {"model": {key: part for key, part in parts.items() if part != []}, "optimizer": optimizer}


@torch.no_grad()
def load_state(engine: HasDeepSpeed, state: dict[str, Any], updates: int) -> None:
    """Take over what was loaded into `sharded_state(loading=True)`; see TrainEngine.load_state.

    The model's weights become what the fp32 weights round to, whatever precision wrote the checkpoint.
    """
    wrapper = engine.engine.optimizer
    with _partitioned(wrapper):
        places = sharded_state(engine, False)
        _take_model(engine, places["model"], state["model"])
        for number, by_name in places["optimizer"].items():
            for name, boxes in by_name.items():
                _take_boxes(boxes, state["optimizer"][number][name])
        set_updates(wrapper, updates)
        for part in owned(wrapper):
            part.weights.copy_(part.state["fp32_param"])
    if hasattr(wrapper, "update_lp_params"):
        # ZeRO-1 and 2: the other ranks' ranges of the weights
        wrapper.update_lp_params()


@torch.no_grad()
def load_weights(engine: HasDeepSpeed, state: dict[str, Any]) -> None:
    """Take over the model part of a state alone; see TrainEngine.load_weights."""
    wrapper = engine.engine.optimizer
    with _partitioned(wrapper):
        _take_model(engine, sharded_state(engine, False)["model"], state)
        for part in owned(wrapper):
            part.state["fp32_param"].copy_(part.weights)


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
def _partitioned(wrapper: Any) -> Iterator[None]:
    """Let ZeRO-3 drop the weights that it has gathered, and gather afterwards those that it always keeps."""
    is_zero3 = hasattr(wrapper, "fp32_partitioned_groups_flat")
    if is_zero3:
        wrapper.checkpoint_event_prologue()
    yield
    if is_zero3:
        wrapper.checkpoint_event_epilogue()


def _own_part(entry: Any) -> Any:
    """Return the boxes of this rank's slice of a parameter that is cut; anything else as it is."""
    if not isinstance(entry, _Entry) or not is_partitioned(entry.data):  # type: ignore[arg-type]
        return entry
    begin, kept = slice_of(entry.data)
    return flat_boxes(entry, entry.key, kept, begin)


def _state_boxes(entry: _Entry, part: Owned, *, loading: bool) -> dict[str, _Boxes]:
    """List the boxes of one range of fp32 weights and moments."""
    models_own = part.weights.untyped_storage()._cdata
    boxes: dict[str, _Boxes] = {}
    for name, kept in part.state.items():
        beside = loading and kept.untyped_storage()._cdata == models_own
        flat = torch.empty_like(kept) if beside else kept
        boxes[name] = flat_boxes(entry, f"{STATE_PREFIX}.{name}.{entry.key}", flat, part.begin)
    return boxes


def _take_model(engine: HasDeepSpeed, places: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Copy loaded weights to the model; what is lacking keeps its value."""
    whole: dict[str, Any] = {}
    for key, value in loaded.items():
        place = places[key]
        # a box that was lacking is not in its list any more, and then no other of its tensor is
        if not isinstance(place, list):
            whole[key] = value
        elif value:
            _take_boxes(place, value)
    (model,) = engine.chunks
    model.load_state_dict(whole, strict=False)


def _take_boxes(places: _Boxes, loaded: Sequence[Tensor]) -> None:
    """Copy what was not read in place."""
    for place, tensor in zip(places, loaded, strict=True):
        assert place.data is not None, f"{place.key} has no place"
        if tensor.data_ptr() != place.data.data_ptr():
            place.data.copy_(tensor)

"""List the part of Megatron's distributed optimizer that one rank owns, for saving and loading.

The optimizer lays parameters end to end in flat buffers and cuts these over the ranks, so a rank owns ranges
of parameters: the end of one, some whole ones, the begin of another. Megatron's own resharding format gathers
the whole buffers on every GPU to put parameters together again. Here each range is stored as the boxes that
it consists of, under the name and shape of its parameter: nothing is gathered, exchanged or copied, and the
files are those of any other layout and engine.

Boxes of m3 on 256 ranks, pp 4, cp 64, ep 64, 15 layers and 2 experts of each on a rank: 3 of each of its 90
expert matrices, and of the 50M dense parameters in its range about 6, at most 3 boxes each, 3 tensors of all.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from msa_train.checkpoint.torch_dist.boxes import flat_boxes
from msa_train.checkpoint.torch_dist.format_versions import STATE_NAMES, STATE_PREFIX
from msa_train.training.optim.stored_moments import has_place, stored

Boxes = dict[str, dict[str, list[ShardedTensor]]]


def owned_boxes(part: Any, model_state: dict[str, Any], *, loading: bool) -> Boxes:
    """List what this rank owns of the optimizer's state.

    Args:
        part: Megatron's DistributedOptimizer, of dense parameters or of experts.
        model_state: of the model that it updates, sharded tensors with the parameters themselves.
        loading: to be read into; weights that are views of the model's own get memory beside it, since both
            are read and the optimizer's may be more exact.

    Returns:
        By number of the parameter and name of the state: boxes, views of the optimizer's own tensors.
    """
    # moments of zero for an optimizer not stepped yet
    part.init_state_fn(part.optimizer, part.config)
    entries = _entries(model_state)
    boxes: Boxes = {}
    for number, (parameter, begin) in enumerate(_owned_ranges(part)):
        entry = entries[id(parameter)]
        boxes[str(number)] = {
            name: flat_boxes(
                entry, f"{STATE_PREFIX}.{name}.{entry.key}", _flat(kept, parameter, loading=loading), begin
            )
            for name, kept in _state(part, parameter).items()
        }
    return boxes


@torch.no_grad()
def take_over(part: Any, model_state: dict[str, Any], loaded: dict[str, dict[str, list[Tensor]]]) -> None:
    """Copy what was loaded into `owned_boxes` to the optimizer, where it was not read in place.

    Args:
        part: as it was for `owned_boxes`.
        model_state: likewise.
        loaded: tensors in the places of its boxes.
    """
    entries = _entries(model_state)
    for number, (parameter, begin) in enumerate(_owned_ranges(part)):
        for name, kept in _state(part, parameter).items():
            flat = kept.detach().view(-1) if has_place(kept) else torch.empty(kept.numel())
            places = flat_boxes(entries[id(parameter)], name, flat, begin)
            for box, tensor in zip(places, loaded[str(number)][name], strict=True):
                assert box.data is not None, f"{box.key} has no place"
                if tensor.data_ptr() != box.data.data_ptr():
                    box.data.copy_(tensor)
            if not has_place(kept):
                kept.copy_(flat.view(kept.shape))
    # Megatron's optimizer on host and GPU keeps copies of its own
    if hasattr(part.optimizer, "_sync_hdo_state_to_sub_optimizers"):
        part.optimizer._sync_hdo_state_to_sub_optimizers()


def _owned_ranges(part: Any) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield the parameters that this rank owns a part of, with the first element that it owns."""
    for by_dtype in part.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start


def _entries(model_state: dict[str, Any]) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """Find the entry of each parameter by its id."""
    return {
        id(entry.data): entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def _state(part: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return this rank's fp32 weights and moments of a parameter by name, as the optimizer keeps them."""
    tensors = part._get_main_param_and_optimizer_states(parameter)
    return {name: tensors["param" if name == "fp32_param" else name] for name in STATE_NAMES}


def _flat(kept: Tensor, parameter: nn.Parameter, *, loading: bool) -> Tensor:
    """Return what is stored or read into: [elements owned], a view of what is kept where that can be."""
    flat = stored(kept, loading=loading).view(-1)
    is_models_own = flat.untyped_storage()._cdata == parameter.untyped_storage()._cdata
    return torch.empty_like(flat) if loading and is_models_own else flat

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
from msa_train.training.optim.block_scaled import BlockScaled

Boxes = dict[str, dict[str, list[ShardedTensor]]]


def owned_boxes(part: Any, model_state: dict[str, Any], *, loading: bool) -> Boxes:
    """List what this rank owns of the optimizer's state.

    Args:
        part: Megatron's DistributedOptimizer, of dense parameters or of experts.
        model_state: of the model that it updates, sharded tensors with the parameters themselves.
        loading: to be read into; weights that are views of the model's own get memory beside it, since both
            are read and the optimizer's may be more exact.

    Returns:
        By number of the parameter and name of the state: boxes, views of the optimizer's own tensors. Moments
        of fewer bits than fp32 come as fp32 copies on the host, 8 bytes per parameter owned.
    """
    # moments of zero for an optimizer not stepped yet
    part.init_state_fn(part.optimizer, part.config)
    entries = _entries(model_state)
    boxes: Boxes = {}
    for number, (parameter, begin) in enumerate(_owned_ranges(part)):
        tensors = _flat_state(part, parameter)
        if loading and _share_memory(tensors["fp32_param"], parameter):
            tensors["fp32_param"] = torch.empty_like(tensors["fp32_param"])
        entry = entries[id(parameter)]
        boxes[str(number)] = {
            name: flat_boxes(entry, f"{STATE_PREFIX}.{name}.{entry.key}", tensors[name], begin)
            for name in STATE_NAMES
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
        tensors = _flat_state(part, parameter)
        for name, flat in tensors.items():
            boxes = flat_boxes(entries[id(parameter)], name, flat, begin)
            for box, tensor in zip(boxes, loaded[str(number)][name], strict=True):
                assert box.data is not None, f"{box.key} has no place"
                if tensor.data_ptr() != box.data.data_ptr():
                    box.data.copy_(tensor)
        _round_back(part, parameter, tensors)
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
    """List the model's sharded tensors by the identity of the parameter that they are of."""
    return {
        id(entry.data): entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def _flat_state(part: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return this rank's weights and moments of a parameter by name: [elements owned], fp32."""
    tensors = part._get_main_param_and_optimizer_states(parameter)
    kept = {name: tensors["param" if name == "fp32_param" else name].detach() for name in STATE_NAMES}
    return {
        name: (tensor.to("cpu", torch.float32) if _is_narrow(tensor) else tensor).view(-1)
        for name, tensor in kept.items()
    }


def _round_back(part: Any, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
    """Take fp32 copies over to the moments that they are copies of."""
    kept = part._get_main_param_and_optimizer_states(parameter)
    for name, tensor in tensors.items():
        if name in kept and _is_narrow(kept[name]):
            kept[name].copy_(tensor.view(kept[name].shape))


def _is_narrow(tensor: Tensor) -> bool:
    """Tell whether a tensor has no memory in fp32: bf16, or fp8 that looks like fp32."""
    return tensor.dtype != torch.float32 or isinstance(tensor, BlockScaled)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()

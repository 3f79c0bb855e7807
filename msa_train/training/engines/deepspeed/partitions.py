"""Find the fp32 weights and moments that a rank owns in each of DeepSpeed's optimizers.

    ZeRO-1, ZeRO-2          the parameters of a group lie end to end, padded; each rank has one range of them
    ZeRO-1 in bf16          the same, by a class of its own (BF16_Optimizer)
    ZeRO-3                  of each parameter its own range, as long on each rank, padded at its end
    none, bf16              every rank has all, an fp32 copy beside each parameter
    none, fp32              every rank has all, the parameters themselves

The groups of experts are cut over the ranks that hold the same experts, so nothing here depends on which
group a parameter is in. With offload to host memory the tensors are there; with offload to NVMe they come
into memory by `swapped_states`, a sub-group at a time.

Nothing is copied and nothing exchanged: tensors are views of DeepSpeed's own. The names of its attributes are
those of 0.19.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msa_train.checkpoint.torch_dist.format_versions import STATE_NAMES
from msa_train.training.engines.deepspeed.swapped_states import SwappedStates, is_in_file

_MOMENTS = STATE_NAMES[1:]


@dataclass(frozen=True, slots=True)
class Owned:
    """Hold the range of a parameter that this rank updates."""

    parameter: nn.Parameter
    "of the model"
    begin: int
    "first element of the range, in the order of the parameter's rows"
    weights: Tensor
    "[n] of the model's precision: the range in what the model computes with, a view; or in a file"
    state: dict[str, Tensor]
    "[n] each, views: fp32 weights and moments by the names in checkpoints"


@dataclass(frozen=True, slots=True)
class _Range:
    """Hold the place of a range in its parameter and in what the optimizer updates as one tensor."""

    parameter: nn.Parameter
    begin: int
    "in the parameter"
    at: int
    "in the optimizer's tensor"
    count: int
    "elements"


@dataclass(frozen=True, slots=True)
class _Unit:
    """Hold one tensor that torch's optimizer updates, whose state is found by it."""

    key: Tensor
    "the optimizer's parameter"
    ranges: list[_Range]
    "of the parameters that lie in it; what is between and behind them is padding"


def owned(wrapper: Any, files: SwappedStates | None = None) -> Iterator[Owned]:
    """List what this rank owns, in an order that does not change during a run.

    Moments of zero are made for an optimizer that has not been stepped yet.

    Args:
        wrapper: `engine.optimizer` of DeepSpeed.
        files: with offload to NVMe; what is in files gets its values when it is copied, see `deferred`.
    """
    for number, unit in enumerate(_units(wrapper)):
        if files is not None and files.has(number):
            yield from _parts(unit, files.deferred(number), files)
        else:
            yield from _parts(unit, _in_memory(wrapper, unit.key), files)


def opened(wrapper: Any, files: SwappedStates | None = None) -> Iterator[Owned]:
    """List what this rank owns as `owned` does, to be changed: it is in memory until the next is asked for.

    Weights of the model that are in files become what the fp32 weights round to.
    """
    for number, unit in enumerate(_units(wrapper)):
        if files is not None and files.has(number):
            with files.opened(number) as tensors:
                yield from _parts(unit, tensors, files)
            continue
        yield from _parts(unit, _in_memory(wrapper, unit.key), files)
        if files is not None:
            files.put_weights(number)


def _parts(unit: _Unit, tensors: Sequence[Tensor], files: SwappedStates | None) -> Iterator[Owned]:
    """List the ranges of one unit, whose weights and moments are given."""
    for place in unit.ranges:
        yield Owned(
            parameter=place.parameter,
            begin=place.begin,
            weights=_weights(place, files),
            state={
                name: tensor.narrow(0, place.at, place.count)
                for name, tensor in zip(STATE_NAMES, tensors, strict=True)
            },
        )


def set_updates(wrapper: Any, updates: int) -> None:
    """Set the count of updates, which Adam corrects the moments' bias by.

    Args:
        wrapper: `engine.optimizer` of DeepSpeed.
        updates: made so far.
    """
    base = base_optimizer(wrapper)
    for state in base.state.values():
        step = state.get("step", 0)
        state["step"] = step.fill_(float(updates)) if isinstance(step, Tensor) else updates
    for group in base.param_groups:
        # DeepSpeed's fused Adam begins states that are not there yet with it
        if "step" in group:
            group["step"] = updates


def base_optimizer(wrapper: Any) -> torch.optim.Optimizer:
    """Return the optimizer of torch's kind that DeepSpeed's wrapper steps; without a wrapper the same."""
    return wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer


def is_partitioned(parameter: Tensor) -> bool:
    """Tell whether ZeRO-3 has cut a parameter, so that it may have no elements between layers' calls."""
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a parameter that ZeRO-3 may have cut."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]


def slice_of(parameter: Any, files: SwappedStates | None = None) -> tuple[int, Tensor]:
    """Return first element and content of this rank's slice of a parameter that ZeRO-3 has cut.

    A slice that is in a file gets its values when it is copied, and is on no device before.

    Example: [10] on 4 ranks is padded to 12: rank 3 has elements 9 to 11, of which one is there: (9, [1]).
    """
    begin, count = _place_of(parameter)
    if files is not None and is_in_file(parameter):
        return begin, files.slice_of(parameter)[:count]
    return begin, parameter.ds_tensor.detach().view(-1)[:count]


def _place_of(parameter: Any) -> tuple[int, int]:
    """Return first element and length of this rank's slice of a parameter, padding left out."""
    most: int = parameter.ds_tensor.ds_numel
    begin = min(dist.get_rank(parameter.ds_process_group) * most, parameter.ds_numel)
    return begin, min(most, parameter.ds_numel - begin)


def _units(wrapper: Any) -> list[_Unit]:
    """List what the optimizer updates, by the attribute that each class of DeepSpeed keeps it in."""
    kinds: dict[str, Callable[[Any], list[_Unit]]] = {
        "fp32_partitioned_groups_flat": _of_zero3,
        "single_partition_of_fp32_groups": _of_zero12,
        "fp32_groups_flat_partition": _of_bf16,
        "fp32_groups": _of_copies,
    }
    for attribute, units in kinds.items():
        if hasattr(wrapper, attribute):
            return units(wrapper)
    if isinstance(wrapper, torch.optim.Optimizer):
        return [_whole(p, p) for group in wrapper.param_groups for p in group["params"]]
    raise TypeError(f"{type(wrapper).__name__}: checkpoints do not know this optimizer of DeepSpeed's")


def _of_zero3(wrapper: Any) -> list[_Unit]:
    units: list[_Unit] = []
    for key, parameters in zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True):
        ranges, at = [], 0
        for parameter in parameters:
            begin, count = _place_of(parameter)
            ranges.append(_Range(parameter, begin, at, count))
            at += parameter.ds_tensor.ds_numel
        units.append(_Unit(key, [one for one in ranges if one.count]))
    return units


def _of_zero12(wrapper: Any) -> list[_Unit]:
    groups = zip(
        wrapper.single_partition_of_fp32_groups,
        wrapper.round_robin_bit16_groups,
        wrapper.round_robin_bit16_offsets,
        wrapper.real_dp_process_group,
        strict=True,
    )
    return [
        _Unit(key, _cut(parameters, offsets, dist.get_rank(group) * key.numel(), key.numel()))
        for key, parameters, offsets, group in groups
    ]


def _of_bf16(wrapper: Any) -> list[_Unit]:
    units: list[_Unit] = []
    groups = zip(
        wrapper.fp32_groups_flat_partition, wrapper.bf16_groups, wrapper.real_dp_process_group, strict=True
    )
    for key, parameters, group in groups:
        offsets = [0]
        for parameter in parameters:
            offsets.append(offsets[-1] + parameter.numel())
        units.append(
            _Unit(key, _cut(parameters, offsets[:-1], dist.get_rank(group) * key.numel(), key.numel()))
        )
    return units


def _of_copies(wrapper: Any) -> list[_Unit]:
    return [
        _whole(key, parameter)
        for keys, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        for key, parameter in zip(keys, parameters, strict=True)
    ]


def _whole(key: Tensor, parameter: nn.Parameter) -> _Unit:
    return _Unit(key, [_Range(parameter, 0, 0, parameter.numel())])


def _cut(parameters: Sequence[nn.Parameter], offsets: Sequence[int], begin: int, count: int) -> list[_Range]:
    """Find the parts of parameters that lie in a range of the line that they are laid in.

    Example: parameters of 6 and 5 elements at 0 and 6, elements 4 to 7: elements 4, 5 of the first at 0 and
    elements 0, 1 of the second at 2.
    """
    found: list[_Range] = []
    for parameter, offset in zip(parameters, offsets, strict=True):
        first, stop = max(offset, begin), min(offset + parameter.numel(), begin + count)
        if first < stop:
            found.append(_Range(parameter, first - offset, first - begin, stop - first))
    return found


def _weights(place: _Range, files: SwappedStates | None) -> Tensor:
    """Return a range of what the model computes with: [n], a view."""
    if is_partitioned(place.parameter):
        return slice_of(place.parameter, files)[1]
    return place.parameter.detach().view(-1)[place.begin : place.begin + place.count]


def _in_memory(wrapper: Any, key: Tensor) -> list[Tensor]:
    """Return weights and moments, flat, making moments of zero where there are none."""
    base = base_optimizer(wrapper)
    state = base.state[key]
    if not set(_MOMENTS) <= set(state):
        state.update({name: torch.zeros_like(key, requires_grad=False) for name in _MOMENTS})
        state.setdefault("step", _no_updates(base, key))
    return [tensor.detach().view(-1) for tensor in (key, *(state[name] for name in _MOMENTS))]


def _no_updates(base: torch.optim.Optimizer, key: Tensor) -> Tensor | int:
    """Count no updates in the way of the optimizer: torch's by tensors, DeepSpeed's own by numbers."""
    if not isinstance(base, torch.optim.Adam | torch.optim.AdamW):
        return 0
    on_device = base.param_groups[0].get("fused") or base.param_groups[0].get("capturable")
    return torch.zeros((), dtype=torch.float32, device=key.device if on_device else "cpu")

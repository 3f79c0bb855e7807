"""Ranges of parameters in the flat partitions of ZeRO, against laying every element out."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

from msa_train.checkpoint.torch_dist.staging import HostStager
from msa_train.training.engines.deepspeed.partitions import opened, owned, set_updates
from msa_train.training.engines.deepspeed.swapped_states import SwappedStates

SHAPES = [(3, 4), (5,), (2, 3), (7,)]


def zero12(rank: int, world_size: int, alignment: int) -> tuple[Any, list[nn.Parameter]]:
    """What ZeRO-1 and 2 keep of one group, laid out element by element, with its parameters."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    line: list[torch.Tensor] = []
    offsets: list[int] = []
    for parameter in parameters:
        offsets.append(sum(map(len, line)))
        line.append(parameter.detach().reshape(-1))
        line.append(torch.full(((-parameter.numel()) % alignment,), torch.nan))
    flat = torch.cat(line)
    flat = torch.cat([flat, torch.full(((-len(flat)) % (2 * world_size),), torch.nan)])
    part = nn.Parameter(flat.view(world_size, -1)[rank].clone())
    wrapper = SimpleNamespace(
        single_partition_of_fp32_groups=[part],
        round_robin_bit16_groups=[parameters],
        round_robin_bit16_offsets=[offsets],
        real_dp_process_group=[None],
        optimizer=torch.optim.AdamW([part]),
    )
    return wrapper, parameters


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_element_has_one_owner_at_its_place(
    world_size: int, alignment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [torch.zeros(shape).view(-1) for shape in SHAPES]
    for rank in range(world_size):
        torch.manual_seed(0)
        wrapper, parameters = zero12(rank, world_size, alignment)
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        for part in owned(wrapper):
            number = next(i for i, one in enumerate(parameters) if one is part.parameter)
            counts[number][part.begin : part.begin + len(part.weights)] += 1
            assert torch.equal(part.state["fp32_param"], part.weights)
            assert {name: len(one) for name, one in part.state.items()} == dict.fromkeys(
                ("fp32_param", "exp_avg", "exp_avg_sq"), len(part.weights)
            )
    assert all(bool((count == 1).all()) for count in counts)


def test_moments_are_made_once_and_updates_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper, _ = zero12(0, 2, 1)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    for part in owned(wrapper):
        assert not part.state["exp_avg"].any()
        part.state["exp_avg"].fill_(2.0)
    assert all(bool((part.state["exp_avg"] == 2.0).all()) for part in owned(wrapper))
    set_updates(wrapper, 7)
    (state,) = wrapper.optimizer.state.values()
    assert float(state["step"]) == 7.0


def test_a_plain_optimizer_owns_whole_parameters() -> None:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    parts = list(owned(torch.optim.AdamW(parameters)))
    assert [part.parameter for part in parts] == parameters
    assert all(torch.equal(part.weights, one.view(-1)) for part, one in zip(parts, parameters, strict=True))
    assert all(
        part.state["fp32_param"].data_ptr() == one.data_ptr()
        for part, one in zip(parts, parameters, strict=True)
    )


def test_another_optimizer_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="SimpleNamespace: checkpoints do not know"):
        list(owned(SimpleNamespace()))


class Swapping:
    """ZeRO-3 of one rank whose sub-groups are in files, here in a dict, and one at a time in memory."""

    swap_optimizer = True

    def __init__(self, counts: Sequence[int], least: int) -> None:
        self.least = least
        self.parameter_offload = SimpleNamespace(get_param_coordinator=SimpleNamespace)
        self.fp16_groups, self.fp32_partitioned_groups_flat = [], []
        self.optimizer = torch.optim.AdamW([nn.Parameter(torch.empty(0))])
        self.fp16_partitioned_groups_flat: list[torch.Tensor | None] = []
        self.fp16_partitioned_groups_flat_numel = list(counts)
        self.files: dict[int, list[torch.Tensor]] = {}
        self.resident: int | None = None
        self.read: list[int] = []
        "sub-groups, in the order in which they were brought in"
        for number, count in enumerate(counts):
            parameter: Any = nn.Parameter(torch.arange(count) + 100.0 * number)
            parameter.ds_tensor = parameter.detach().clone()
            parameter.ds_tensor.ds_numel = parameter.ds_numel = count
            parameter.ds_process_group = None
            self.fp16_groups.append([parameter])
            self.fp16_partitioned_groups_flat.append(parameter.ds_tensor)
            self.fp32_partitioned_groups_flat.append(nn.Parameter(parameter.detach().clone()))
            if count >= least:
                self.files[number] = [parameter.detach().clone()]
                self.fp32_partitioned_groups_flat[number].data = torch.empty(0)

    def _swappable_optimizer_subgroup(self, number: int) -> bool:
        return self.fp16_partitioned_groups_flat_numel[number] >= self.least

    def _kept(self, number: int) -> list[torch.Tensor]:
        key = self.fp32_partitioned_groups_flat[number]
        state = self.optimizer.state[key]
        return [key, *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)]

    def _optimizer_states_and_gradient_swap_in(self, number: int) -> None:
        assert self.resident is None, "there are buffers for one"
        self.resident = number
        self.read.append(number)
        for kept, content in zip(self._kept(number), self.files[number], strict=True):
            kept.data = content.clone()

    def _optimizer_states_and_gradient_swap_out(self, number: int) -> None:
        assert self.resident == number
        self.files[number] = [kept.detach().clone() for kept in self._kept(number)]
        self._release_swap_buffers(number)

    def _release_swap_buffers(self, number: int) -> None:
        assert self.resident == number
        self.resident = None
        for kept in self._kept(number):
            kept.data = torch.empty(0)


def staged(parts: list[Any], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Copies of the states of parts as a save makes them, state by state in place of part by part."""
    shards = {
        f"{name}.{number}": [
            ShardedTensor.from_rank_offsets(f"{name}.{number}", part.state[name], replica_id=0)
        ]
        for name in names
        for number, part in enumerate(parts)
    }
    copies = HostStager().stage(shards, {}).shards  # type: ignore[arg-type]
    return {key: entries[0].data for key, entries in copies.items()}  # type: ignore[misc]


def test_what_is_in_files_comes_in_once_for_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    names = ("fp32_param", "exp_avg", "exp_avg_sq")
    wrapper: Any = Swapping([6, 2, 5], least=4)
    files = SwappedStates(None, wrapper)  # type: ignore[arg-type]
    fresh = staged(list(owned(wrapper, files)), names)
    assert not any(fresh[f"{name}.{number}"].any() for name in names[1:] for number in range(3))
    files.release()
    for number, part in enumerate(opened(wrapper, files)):
        assert wrapper.resident == (None if number == 1 else number), "the second one is always in memory"
        for factor, name in enumerate(names, start=2):
            part.state[name].copy_(torch.arange(len(part.weights)) * factor + number)
    assert wrapper.resident is None
    set_updates(wrapper, 3)
    wrapper.read.clear()
    got = staged(list(owned(wrapper, files)), names)
    assert wrapper.read == [0, 2], "each is brought in once, whatever the order of the keys"
    for number, count in enumerate([6, 2, 5]):
        for factor, name in enumerate(names, start=2):
            assert torch.equal(got[f"{name}.{number}"], torch.arange(count) * float(factor) + number)
    assert wrapper.resident == 2
    files.release()
    assert wrapper.resident is None, "the update needs the buffers"
    assert {float(state["step"]) for state in wrapper.optimizer.state.values()} == {3.0}

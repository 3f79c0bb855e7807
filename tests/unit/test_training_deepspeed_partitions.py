"""Ranges of parameters in the flat partitions of ZeRO, against laying every element out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from msa_train.training.engines.deepspeed.partitions import owned, set_updates

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


def test_what_is_in_files_is_refused() -> None:
    wrapper = SimpleNamespace(swap_optimizer=True, params_in_nvme_and_cpu=False)
    with pytest.raises(
        ValueError, match=r"^deepspeed\.offload_optimizer=nvme: .*; use deepspeed\.offload_optim"
    ):
        list(owned(wrapper))

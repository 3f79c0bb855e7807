"""A whole plan goes to a device in one copy; only a device that is none of a CPU shows it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from msa_train.config import CpLayout
from msa_train.parallel.comm.to_device import plan_to_device
from msa_train.parallel.sharding.partition import make_partition
from msa_train.parallel.sharding.shard_layout import ShardLayout

META = torch.device("meta")


@dataclass(slots=True, frozen=True)
class Plan:
    """Tensors of several types and sizes, nested."""

    rows: Tensor
    mask: Tensor
    moves: tuple[Tensor, list[Tensor], None]
    layout: ShardLayout
    name: str = "plan"


def make_plan() -> Plan:
    split = make_partition(CpLayout.zigzag, 2, [0, 8], 2)
    layout = ShardLayout(seq_len=8, block_size=2, cp_rank=0, cp_size=2, split=split)
    moves = (torch.arange(3), [torch.zeros(0, dtype=torch.int64), torch.arange(4).view(2, 2)], None)
    return Plan(torch.arange(5), torch.tensor([True, False, True]), moves, layout)


def note_copies(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Host tensors that are copied to the device from now on."""
    copies: list[Tensor] = []
    to = Tensor.to

    def noting(self: Tensor, device: torch.device, **options: bool) -> Tensor:
        if device == META:
            copies.append(self)
        return to(self, device, **options)

    monkeypatch.setattr(Tensor, "to", noting)
    return copies


def test_nothing_is_copied_on_a_cpu() -> None:
    plan = make_plan()
    assert plan_to_device(plan, torch.device("cpu")) is plan


def test_everything_arrives_by_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types stay, all tensors share one storage, and there is one copy to the device."""
    copies = note_copies(monkeypatch)
    plan, moved = make_plan(), plan_to_device(make_plan(), META)
    assert len(copies) == 1
    pairs = [(plan.rows, moved.rows), (plan.mask, moved.mask), (plan.moves[0], moved.moves[0])]
    pairs += list(zip(plan.moves[1], moved.moves[1], strict=True))
    for before, after in pairs:
        assert (after.device, after.dtype, after.shape) == (META, before.dtype, before.shape)
        assert after.storage_offset() * after.element_size() % 16 == 0
    assert (moved.name, moved.moves[2]) == ("plan", None)
    assert moved.layout.blocks(META).device == META, "the layout has its block ids there"


def test_values_arrive_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The joint buffer read back as each tensor gives the numbers that went in."""
    copies = note_copies(monkeypatch)
    plan, moved = make_plan(), plan_to_device(make_plan(), META)
    for before, after in [
        (plan.rows, moved.rows),
        (plan.mask, moved.mask),
        (plan.moves[1][1], moved.moves[1][1]),
    ]:
        begin = after.storage_offset() * after.element_size()
        part = copies[0][begin : begin + before.numel() * before.element_size()]
        assert torch.equal(part.view(before.dtype).view(before.shape), before)

"""Ranges of tensors as boxes, and even shares of what several ranks hold."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from msa_train.checkpoint.torch_dist.boxes import flat_boxes, range_boxes, range_of, row_major
from msa_train.checkpoint.torch_dist.shares import holders, own_share, shard_name
from msa_train.checkpoint.torch_dist.staging import HostStager, tensors_of
from msa_train.checkpoint.torch_dist.writer import Shards
from msa_train.training.optim.block_scaled import BlockScaled
from msa_train.training.optim.stored_moments import stored

EXPERTS, ROWS, COLUMNS = 3, 4, 5


def test_boxes_of_any_range_of_any_view() -> None:
    """Every element of the range is in one box, whatever the order of dimensions and the gaps."""
    draw = random.Random(0)
    most: dict[int, int] = {}
    for _ in range(2000):
        shape = [draw.randint(1, 4) for _ in range(draw.randint(0, 4))]
        view = torch.arange(int(torch.Size(shape).numel())).view(shape)
        view = view.permute(draw.sample(range(len(shape)), len(shape)))
        if shape and draw.random() < 0.5:
            dim = draw.randrange(len(shape))
            size = draw.randint(1, view.shape[dim])
            view = view.narrow(dim, draw.randint(0, view.shape[dim] - size), size)
        begin = draw.randint(-3, 70)
        end = begin + draw.randint(0, 70)
        place = int(view.storage_offset())
        boxes = range_boxes(tuple(view.shape), view.stride(), begin - place, end - place)
        got = [value for box in boxes for value in box.of(view).flatten().tolist()]
        assert sorted(got) == sorted(value for value in view.flatten().tolist() if begin <= value < end)
        most[len(shape)] = max(most.get(len(shape), 0), len(boxes))
    assert all(count <= max(1, 2 * dims - 1) for dims, count in most.items()), most


def test_boxes_of_a_matrix() -> None:
    boxes = range_boxes((4, 5), row_major((4, 5)), 3, 12)
    assert [(box.offsets, box.sizes) for box in boxes] == [
        ((0, 3), (1, 2)),
        ((1, 0), (1, 5)),
        ((2, 0), (1, 2)),
    ]
    assert range_boxes((4, 0), (1, 1), 0, 9) == []


def filled(shape: tuple[int, ...], boxes: list[ShardedTensor]) -> torch.Tensor:
    """The whole tensor as the files would hold it; -1 where no box is."""
    result = torch.full(shape, -1.0)
    for box in boxes:
        assert box.data is not None
        place = tuple(
            slice(at, at + size) for at, size in zip(box.global_offset, box.data.shape, strict=True)
        )
        assert (result[place] == -1).all(), "two boxes overlap"
        assert box.data.shape == box.local_shape
        result[place] = box.data
    return result


@pytest.mark.parametrize("kind", ["plain", "halves", "columns"])
def test_a_flat_range_is_cut_as_its_parameter(kind: str) -> None:
    """An expert's matrix whose halves lie apart in the checkpoint, owned by three ranks in flat ranges."""
    shape = (EXPERTS, ROWS, COLUMNS) if kind != "columns" else (EXPERTS, ROWS, COLUMNS + 1)
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    parameter = whole[1].clone()

    def build(key: str, data: Any, replica_id: Any, _: Any) -> list[ShardedTensor]:
        dim = 1 if kind == "columns" else 0
        return [
            ShardedTensor.from_rank_offsets(
                key, half, (0, 1, EXPERTS), (1 + dim, number, 2), prepend_axis_num=1, replica_id=replica_id
            )
            for number, half in enumerate(data.chunk(2, dim=dim))
        ]

    plain = ShardedTensor.from_rank_offsets("w", parameter, (0, 1, EXPERTS), prepend_axis_num=1)
    factory = ShardedTensorFactory("w", parameter, build, torch.cat)
    entry = plain if kind == "plain" else factory
    flat, boxes = parameter.view(-1), []
    for begin, end in ((0, 3), (3, 14), (14, flat.numel())):
        part = flat[begin:end]
        found = flat_boxes(entry, "m", part, begin)
        storage = part.untyped_storage().data_ptr()
        assert all(box.data.untyped_storage().data_ptr() == storage for box in found)  # type: ignore[union-attr]
        boxes += found
    assert {box.key for box in boxes} == {"m"}
    got = filled(shape, boxes)
    assert torch.equal(got[1], whole[1])
    assert (got[[0, 2]] == -1).all()


def test_a_factory_that_copies_is_refused() -> None:
    def build(key: str, data: Any, *_: Any) -> list[ShardedTensor]:
        return [ShardedTensor.from_rank_offsets(key, data.t().contiguous())]

    entry = ShardedTensorFactory("w", torch.zeros(ROWS, COLUMNS), build, torch.cat)
    with pytest.raises(ValueError, match="m: its parts are no views"):
        flat_boxes(entry, "m", torch.zeros(3), 0)


def held_by(rank: int) -> Shards:
    """Rows that each rank has alone, tensors of all ranks, one of ranks 0 and 1, an object, an empty one."""
    everywhere = {
        "a": torch.arange(70.0).view(14, 5),
        "b": torch.arange(9.0),
        "c": torch.arange(24.0).view(2, 3, 4).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 5),
    }
    shards: Shards = {
        key: [ShardedTensor.from_rank_offsets(key, value, replica_id=rank)]
        for key, value in everywhere.items()
    }
    shards["own"] = [ShardedTensor.from_rank_offsets("own", torch.full((2, 3), float(rank)), (0, rank, 3))]
    if rank < 2:
        shards["pair"] = [ShardedTensor.from_rank_offsets("pair", torch.arange(40.0), replica_id=rank)]
    shards["kind/shard_0_1"] = [ShardedObject("kind", "adam", (1,), (0,), replica_id=rank)]
    return shards


def test_shares_are_even_and_whole() -> None:
    held = [held_by(rank) for rank in range(3)]
    names = [[shard_name(one) for key in part for one in part[key] if key[0] != "k"] for part in held]  # type: ignore[arg-type]
    found = holders(names)
    shares = [own_share(part, found, rank) for rank, part in enumerate(held)]
    together: dict[str, list[Any]] = {}
    for share in shares:
        for key, entries in share.items():
            together.setdefault(key, []).extend(entries)
    assert len(together.pop("kind/shard_0_1")) == 1
    assert len(together["empty"]) == 1
    for key, entries in together.items():
        shape = entries[0].global_shape
        want = torch.cat([part["own"][0].data for part in held]) if key == "own" else held[0][key][0].data  # type: ignore[union-attr, arg-type]
        assert torch.equal(filled(shape, entries), want.float()), key  # type: ignore[union-attr]
    # 4 x (70 + 9 + 1) + 2 x 24 of all, 160 of two, 24 each alone; cuts are at whole rows of 20 bytes
    sizes = [sum(tensor.nbytes for _, tensor in tensors_of(share)) for share in shares]
    assert sum(sizes) == 368 + 160 + 3 * 24
    assert sizes == pytest.approx([368 / 3 + 80 + 24, 368 / 3 + 80 + 24, 368 / 3 + 24], abs=20)
    # a tensor is cut once for each holder at most
    assert sum(len(entries) for entries in together.values()) <= 4 + 2 * 3 + 2 + 3 + 1 + 4


def test_shares_of_shards_that_differ() -> None:
    """Another type or place is another shard."""
    one = ShardedTensor.from_rank_offsets("w", torch.zeros(4, 2), (0, 0, 2))
    other = replace(one, global_offset=(4, 0))
    assert shard_name(one) == shard_name(replace(one, data=None, replica_id=3))
    assert len({shard_name(one), shard_name(other), shard_name(replace(one, key="v"))}) == 3
    assert holders([[7, 8, 7], [8]]) == {7: [0], 8: [0, 1]}
    assert [box.local_shape for box in range_of(one, 0, 8)] == [(4, 2)]


def test_fp8_moments_become_fp32_when_they_are_copied() -> None:
    """Cut by a factory, into boxes and into shares, and only then made, in the place of the copy."""
    whole = torch.zeros(40, 30)
    moments = BlockScaled.zeros(torch.Size([1000]), torch.device("cpu"), is_root=False, pin=False)
    moments.copy_(torch.randn(1000))
    whole.view(-1)[100:1100] = moments.read()
    entry = ShardedTensorFactory(
        "w",
        whole,
        lambda key, data, *_: [
            ShardedTensor.from_rank_offsets(key, half, (1, number, 2))
            for number, half in enumerate(data.chunk(2, dim=1))
        ],
        torch.cat,
    )
    boxes = flat_boxes(entry, "m", stored(moments, loading=False).view(-1), 100)
    assert all(box.data.is_meta for box in boxes)  # type: ignore[union-attr]
    stager, got = HostStager(), torch.full((40, 30), -1.0)
    for box in [part for one in boxes for part in range_of(one, 0, 7) + range_of(one, 7, 2000)]:
        ((key, copied),) = tensors_of(stager.stage({"m": [box]}, {}).shards)
        assert (key, copied.dtype) == ("m", torch.float32)
        place = tuple(
            slice(at, at + size) for at, size in zip(box.global_offset, box.local_shape, strict=True)
        )
        got[place] = copied
    assert torch.equal(got.view(-1)[100:1100], whole.view(-1)[100:1100])
    assert (got.view(-1)[:100] == -1).all()
    assert (got.view(-1)[1100:] == -1).all()
    assert stored(whole, loading=False).data_ptr() == whole.data_ptr()
    assert stored(moments, loading=True).shape == moments.shape

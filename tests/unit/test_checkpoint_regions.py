"""Parts of stored tensors, read from where they are; and who of a node reads what."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msa_train.checkpoint.torch_dist import regions
from msa_train.checkpoint.torch_dist.boxes import Box
from msa_train.checkpoint.torch_dist.node_reads import batches, deal, read_wanted
from msa_train.checkpoint.torch_dist.regions import Region, RegionReader, in_pieces

NAME = "__0_0.distcp"


def store(folder: Path, tensor: torch.Tensor, before: int) -> tuple[int, int]:
    """Store a tensor somewhere in a file; where it begins, and its length there."""
    with (folder / NAME).open("wb") as file:
        file.write(b"x" * before)
        torch.save(tensor, file)
        length = file.tell() - before
        file.write(b"behind")
    return before, length


@pytest.mark.parametrize("short_bytes", [1, 24, 2**20])
def test_any_box_of_any_tensor(short_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run by run, or with the gaps between runs; of tensors that are not row by row, too."""
    monkeypatch.setattr(regions, "_SHORT_BYTES", short_bytes)
    draw = random.Random(short_bytes)
    for number in range(150):
        shape = tuple(draw.randint(1, 6) for _ in range(draw.randint(0, 4)))
        whole = torch.arange(math.prod(shape)).view(shape).to(draw.choice([torch.float32, torch.bfloat16]))
        is_turned = number % 7 == 0 and len(shape) > 1
        stored = whole.transpose(0, 1).contiguous().transpose(0, 1) if is_turned else whole
        offset, length = store(tmp_path, stored, draw.randint(0, 50))
        begin = tuple(draw.randint(0, size - 1) for size in shape)
        wanted = tuple(draw.randint(1, size - first) for size, first in zip(shape, begin, strict=True))
        region = Region(NAME, offset, length, shape, begin, wanted, str(whole.dtype).removeprefix("torch."))
        out = torch.full((1, 2, *wanted), -1.0, dtype=torch.float64)
        # places of another type, and not in one piece
        read_wanted([(region, out[0, 0]), (region, out[0, 1])], tmp_path, None)
        assert torch.equal(out[0, 0], Box(begin, wanted).of(whole).double()), region
        assert torch.equal(out[0, 1], out[0, 0])


def test_only_what_is_wanted_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(64, 4096)
    offset, length = store(tmp_path, whole, 3)
    read: list[int] = []
    original = regions.read_bytes
    monkeypatch.setattr(
        regions, "read_bytes", lambda file, at, out: read.append(len(out)) or original(file, at, out)
    )
    region = Region(NAME, offset, length, (64, 4096), (8, 0), (16, 2048), "float32")
    out = torch.empty(16, 2048)
    read_wanted([(region, out)], tmp_path, None)
    assert read == [2048 * 4] * 16
    assert torch.equal(out, whole[8:24, :2048])
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:-2000])
    with pytest.raises(Exception, match=r"ends too early|central directory|zip"):
        read_wanted([(replace(region, begin=(48, 0)), out)], tmp_path, None)


def test_pieces_cover_a_box_once() -> None:
    draw = random.Random(0)
    for _ in range(200):
        shape, most = tuple(draw.randint(1, 6) for _ in range(draw.randint(0, 4))), draw.randint(1, 20)
        count = torch.zeros(shape)
        for box in in_pieces(shape, most):
            part = box.of(count)
            part += 1
            assert part.numel() <= most
        assert (count == 1).all()
    assert [box.sizes for box in in_pieces((4, 5), 10)] == [(2, 5), (2, 5)]


def test_a_node_reads_each_region_once() -> None:
    """What one rank alone wants is nobody else's; the rest is dealt evenly and in the order of the disk."""
    found = [Region(NAME, 100 * i, 100, (4, 8), (0, 0), (4, 8), "float32") for i in range(9)]
    dealt = deal([found[:8], found[:8], found[8:]])
    assert sorted(region for part in dealt for region in part) == found[:8]
    assert [len(part) for part in dealt] == [4, 4, 0]
    assert all(part == sorted(part) for part in dealt)
    assert [len(batch) for batch in batches(found, most=300)] == [2, 2, 2, 2, 1]
    assert [len(batch) for batch in batches(found, most=1)] == [1] * 9
    assert batches([]) == []


def test_a_reader_keeps_one_file_open(tmp_path: Path) -> None:
    offset, length = store(tmp_path, torch.arange(6.0), 0)
    (tmp_path / "other").write_bytes((tmp_path / NAME).read_bytes())
    reader = RegionReader(tmp_path)
    out = torch.empty(2)
    for name in (NAME, "other", NAME):
        reader.read(Region(name, offset, length, (6,), (3,), (2,), "float32"), out)
        assert out.tolist() == [3.0, 4.0]
    reader.close()

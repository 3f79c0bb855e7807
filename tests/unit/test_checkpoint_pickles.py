"""Pickles of strangers inside of checkpoints: looked through, refused, never run."""

import io
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from launchers import checkpoint as checkpoint_command
from launchers import convert
from msa_train.config import AttentionConfig, ModelConfig
from msa_train.model import checkpoint_pickles
from msa_train.model.checkpoint_pickles import check_object, metadata_places, objects_damage, read_metadata
from msa_train.model.sharded_files import ShardedReader, ShardedWriter
from msa_train.training.checkpoint_files import file_entry, write_json
from msa_train.training.checkpoint_store import verify_folder
from msa_train.training.rng import rng_state
from msa_train.training.weights_checkpoint import publish_weights, shape_of

DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class Call:
    """A pickle that calls something when it is read."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def dumped(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A true checkpoint with two tensors and an object."""

    def write(target: Path) -> dict[str, dict[str, Any]]:
        writer = ShardedWriter(target)
        writer.add("w", (4, 2), (0, 0), torch.arange(8.0).view(4, 2))
        writer.add("b", (4,), (0,), torch.ones(4, dtype=torch.bfloat16))
        writer.add_empty_object("layer._extra_state")
        writer.close()
        return writer.files

    return publish_weights(tmp_path / "run", ModelConfig(), AttentionConfig(), write, source="test")


def replace(folder: Path, name: str, content: bytes) -> None:
    """Another content that the manifest agrees with, as a forger makes it."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = file_entry(folder / name)
    write_json(folder / "manifest.json", manifest)


def test_true_checkpoint_is_read(folder: Path) -> None:
    assert verify_folder(folder, full=True) is None
    metadata = read_metadata(folder)
    assert isinstance(metadata, dcp.Metadata)
    assert set(metadata.state_dict_metadata) == {"w", "b", "layer._extra_state/shard_0_1"}
    assert ShardedReader(folder).rows("w", 2, 1).tolist() == [[4.0, 5.0]]


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str))
def test_every_type_of_number_is_known(tmp_path: Path, dtype: torch.dtype) -> None:
    properties = dcp.TensorProperties(dtype=dtype, layout=torch.strided)
    entry = dcp.TensorStorageMetadata(properties=properties, size=torch.Size((1,)), chunks=[])
    # where it was written is stored as a path
    meta = dcp.StorageMeta(checkpoint_id=tmp_path)
    content = dcp.Metadata(state_dict_metadata={"x": entry}, storage_data={}, storage_meta=meta)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    assert read_metadata(tmp_path).state_dict_metadata == {"x": entry}


def test_names_of_numbers_stand_for_nothing_else() -> None:
    named = {name for name in dir(torch) if checkpoint_pickles._DTYPE.fullmatch(name)}
    assert {getattr(torch, name) for name in named} == DTYPES


METADATA_BOMBS: dict[str, Callable[[Path], object]] = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"),
    "Path.touch": lambda marker: Call(Path.touch, marker),
    "torch.load": lambda marker: Call(torch.load, marker),
    "inside of a true one": lambda marker: dcp.Metadata(
        state_dict_metadata={"x": Call(os.system, f"touch {marker}")},  # type: ignore[dict-item]
        storage_data={},
        storage_meta=dcp.StorageMeta(),
    ),
}


@pytest.mark.parametrize("kind", METADATA_BOMBS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_bombs_in_metadata_are_not_run(folder: Path, tmp_path: Path, kind: str, protocol: int) -> None:
    marker = tmp_path / "executed"
    replace(folder, ".metadata", pickle.dumps(METADATA_BOMBS[kind](marker), protocol))
    for read in (read_metadata, ShardedReader):
        with pytest.raises(ValueError, match=r"file \.metadata: is not of a checkpoint \(names "):
            read(folder)
    for full in (False, True):
        assert (verify_folder(folder, full=full) or "").startswith("file .metadata: is not of a checkpoint")
    assert not marker.exists()


def test_commands_refuse_a_bomb_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "executed"
    replace(folder, ".metadata", pickle.dumps(Call(os.system, f"touch {marker}")))
    assert checkpoint_command.main(["diff", str(folder), str(folder)]) == 2
    assert convert.main(["export", "--dry-run", str(folder), str(tmp_path / "hf")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert checkpoint_command.main(["verify", str(folder)]) == 1
    assert checkpoint_command.main(["verify", "--quick", str(folder)]) == 1
    assert not marker.exists()


def test_numbers_that_are_not_finite_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint_command.main(["verify", str(folder)]) == 0
    content = (folder / "__0_0.distcp").read_bytes()
    last = torch.tensor([6.0, 7.0]).numpy().tobytes()
    assert content.count(last) == 1
    replace(folder, "__0_0.distcp", content.replace(last, torch.tensor([6.0, torch.nan]).numpy().tobytes()))
    assert checkpoint_command.main(["verify", "--quick", str(folder)]) == 0
    assert checkpoint_command.main(["verify", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder}: not finite: w"


def test_metadata_that_are_no_pickle_are_damage(folder: Path) -> None:
    true = (folder / ".metadata").read_bytes()
    for content in (b"", b"\x80", true[:-20], b"(" * 1000, pickle.dumps([1]), pickle.dumps({})):
        replace(folder, ".metadata", content)
        with pytest.raises(ValueError, match=r"^file \.metadata: is not of a checkpoint \("):
            metadata_places(folder)
        with pytest.raises(ValueError, match=r"is not of a checkpoint"):
            read_metadata(folder)


def test_a_pickle_gives_no_attributes_to_classes(folder: Path) -> None:
    # BUILD with the class itself on the stack, and with slots: setattr(MetadataIndex, "fqn", 1)
    opcodes = (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadataIndex\nN}X\x03\x00\x00\x00fqnK\x01s\x86b."
    )
    before = dict(vars(dcp.MetadataIndex))
    replace(folder, ".metadata", opcodes)
    with pytest.raises(ValueError, match="is not of a checkpoint"):
        read_metadata(folder)
    assert dict(vars(dcp.MetadataIndex)) == before


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "a/b", "..", ""])
def test_places_outside_of_the_checkpoint_are_refused(folder: Path, path: str) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = path
    replace(folder, ".metadata", pickle.dumps(metadata))
    with pytest.raises(ValueError, match="outside of the checkpoint"):
        read_metadata(folder)


def test_bombs_in_objects_are_found(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    content, bomb = (folder / "__0_0.distcp").read_bytes(), dumped([Call(os.system, f"touch {marker}")])
    place = next(place for index, place in metadata.storage_data.items() if "extra" in index.fqn)
    place.offset, place.length = len(content), len(bomb)
    replace(folder, "__0_0.distcp", content + bomb)
    replace(folder, ".metadata", pickle.dumps(metadata))
    assert verify_folder(folder, full=False) is None
    reason = verify_folder(folder, full=True) or ""
    assert reason.startswith("object layer._extra_state/shard_0_1: is no plain value (names "), reason
    place.length += 1
    replace(folder, ".metadata", pickle.dumps(metadata))
    assert (objects_damage(folder) or "").endswith("its file ends too early")
    assert not marker.exists()


def test_bombs_in_common_data_are_found(folder: Path, tmp_path: Path) -> None:
    replace(folder, "common.pt", dumped({"x": Call(os.system, f"touch {tmp_path / 'executed'}")}))
    reason = verify_folder(folder, full=True) or ""
    assert reason.startswith("object common.pt: is no plain value (names "), reason
    assert not (tmp_path / "executed").exists()


def test_plain_values_are_those_that_torch_reads_too() -> None:
    tensors = [torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.uint8)]
    for value in (None, [None], (1, 2.5, "a", b"b", {3}), {"a": tensors}, OrderedDict(a=1), torch.Size((1,))):
        check_object(dumped(value), "x")
        torch.load(io.BytesIO(dumped(value)), weights_only=True)
    # torch.distributed is not initialised: what a rank saves of its generators
    check_object(dumped(rng_state()), "x")
    for value in (np.float64(1.5), Path("a"), len, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=r"object x: is no plain value \(names "):
            check_object(dumped(value), "x")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("model.num_layers", "x", "model.num_layers=x"),
        ("model.num_experts", 10**12, "model.num_experts=1000000000000: must be at most"),
        ("model.rope_theta", [1], r"model.rope_theta=\[1\]"),
        ("model.norm_eps", 1e300, "model.norm_eps=1e"),
        ("model.qk_norm", "other", "model.qk_norm=other"),
        ("model.zero_centered_norm", 1, "model.zero_centered_norm=1"),
        ("model.layer_attention", "\x1b[2J", r"model.layer_attention=\?\[2J"),
    ],
)
def test_settings_of_other_kinds_are_told(folder: Path, name: str, value: object, rule: str) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    meta["fingerprint"][name] = value
    replace(folder, "meta.json", json.dumps(meta).encode())
    assert verify_folder(folder, full=True) is None
    with pytest.raises(ValueError, match=rule):
        shape_of(folder)

"""Headers of safetensors files: one flipped bit, and everything that the safetensors package refuses."""

import json
import os
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from launchers import convert
from msa_train.convert.safetensors_files import INDEX_NAME, SINGLE_NAME, read_index
from msa_train.convert.safetensors_header import Entry, parse_header, read_header
from msa_train.convert.tensor_map import M2_NAMING
from tests.helpers.hf_files import small_m2, write_checkpoint

TENSORS = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.c": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "d": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
    "e": {"dtype": "I64", "shape": [0], "data_offsets": [34, 34]},
}
BODY = bytes(range(34))


def pack(header: object, body: bytes = BODY) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def meaning(entries: dict[str, Entry]) -> dict[str, Any]:
    return {name: (one.dtype, one.shape, one.begin, one.end) for name, one in entries.items()}


def library_accepts(content: bytes) -> bool:
    package = pytest.importorskip("safetensors")
    try:
        package.deserialize(content)
    except Exception:  # the library raises nothing narrower
        return False
    return True


def accepted(path: Path, content: bytes) -> dict[str, Entry] | None:
    """What is read, None for a refusal, which is one line with the path."""
    try:
        return parse_header(path, BytesIO(content), len(content))
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return None


def test_one_flipped_bit_never_moves_data(tmp_path: Path) -> None:
    """Every single bit of a header: refused, or no byte of a tensor that keeps its name is elsewhere."""
    header = {"__metadata__": {"format": "pt"}} | TENSORS
    good, path = pack(header), tmp_path / "x.safetensors"
    want, num_kept = accepted(path, good), 0
    assert want is not None
    assert library_accepts(good)
    for bit in range(8 * (len(good) - len(BODY))):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        got = accepted(path, bytes(content))
        if got is None:
            continue
        assert library_accepts(bytes(content)), (bit, content)
        # a name may differ, which the list of the model's tensors finds; places and types may not
        assert sorted(meaning(got).values()) == sorted(meaning(want).values()), (bit, content)
        num_kept += 1
    assert num_kept, "names may still change"


def changed(**changes: Any) -> bytes:
    return pack(TENSORS | {"a": TENSORS["a"] | changes})


REFUSED = {
    "negative shape": changed(shape=[-2, -3]),
    "text shape": changed(shape="ab"),
    "nested shape": changed(shape=[[2, 3]]),
    "huge shape": changed(shape=[10**30, 10**30]),
    "whole float": changed(shape=[2.0, 3]),
    "true": changed(shape=[True, 6]),
    "null": changed(shape=None),
    "negative offsets": changed(data_offsets=[-24, 0]),
    "reversed offsets": changed(data_offsets=[24, 0]),
    "one offset": changed(data_offsets=[24]),
    "three offsets": changed(data_offsets=[0, 24, 24]),
    "shorter": changed(data_offsets=[0, 20]),
    "other size": changed(shape=[2, 2]),
    "other dtype": changed(dtype="BF16"),
    "unknown dtype": changed(dtype="F31"),
    "dtype 5": changed(dtype=5),
    "dtype list": changed(dtype=[]),
    "gap": pack(TENSORS | {"f": {"dtype": "U8", "shape": [2], "data_offsets": [36, 38]}}, BODY + bytes(4)),
    "overlap": pack(TENSORS | {"f": TENSORS["a"]}),
    "not from 0": pack({"b.c": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}),
    "longer file": pack(TENSORS, BODY + b"\0"),
    "shorter file": pack(TENSORS, BODY[:-1]),
    "same name twice": pack(f'{json.dumps(TENSORS)[:-1]}, "a": {json.dumps(TENSORS["a"])}}}'.encode()),
    "not JSON": pack(b"{"),
    "not an object": pack(b"[]"),
    "deep": pack(b'{"a":' * 100_000),
    "many digits": pack(b'{"a":' + b"9" * 5000 + b"}"),
    "not UTF-8": pack(b'{"\xff": 1}'),
    "metadata": pack(TENSORS | {"__metadata__": {"x": 1}}),
    "escapes": pack({"\x1b]0;x\x07": 1}),
    "empty": b"",
    "length alone": struct.pack("<Q", 5),
    "length beyond the file": struct.pack("<Q", 99 * 2**20) + b"{}",
    "largest length": struct.pack("<Q", 2**64 - 1) + b"{}",
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_damage_is_refused(what: str, tmp_path: Path) -> None:
    assert accepted(tmp_path / "x.safetensors", REFUSED[what]) is None
    # the package takes the last one where transformers and others may take the first
    assert not library_accepts(REFUSED[what]) or what == "same name twice"


def test_types_that_are_not_imported_are_read(tmp_path: Path) -> None:
    """Those of tensors without a place in a model, which an export copies as they are."""
    sizes = {"F4": 1, "F8_E8M0": 2, "BOOL": 2, "U64": 16, "C64": 16}
    header, at = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": name, "shape": [2], "data_offsets": [at, at + size]}
        at += size
    content = pack(header, bytes(at))
    assert library_accepts(content)
    assert accepted(tmp_path / "x.safetensors", content) is not None


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path, why in (
        (tmp_path / "pipe", "is a pipe, not a regular file"),
        (Path("/dev/zero"), "is a device, not a regular file"),
        (tmp_path / "folder", "Is a directory"),
    ):
        with pytest.raises(ValueError, match=rf"^{path}: cannot be read \({why}\)$"):
            read_header(path)


PLACES = {
    "up": "../x.safetensors",
    "absolute": "/etc/passwd",
    "folder": ".",
    "other": "config.json",
    "null": None,
    "number": 5,
    "list": [1],
    "nul": "a\0b.safetensors",
    "escape": "\x1b.safetensors",
    "long": "a" * 5000 + ".safetensors",
    "pipe": "pipe.safetensors",
    "link": "link.safetensors",
    "device": "device.safetensors",
}


@pytest.mark.parametrize("what", PLACES)
def test_places_of_an_index(what: str, tmp_path: Path) -> None:
    """Only regular files in the folder: nothing is read elsewhere, nothing waits for a pipe."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(pack(TENSORS))
    (folder / "link.safetensors").symlink_to("../x.safetensors")
    (folder / "device.safetensors").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": PLACES[what]}}))
    with pytest.raises(ValueError) as caught:
        read_index(folder)
    assert str(caught.value).isprintable()
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"[" * 100_000, b'{"weight_map": []}', b'{"weight_map": {}}']
)
def test_index_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json: is not .*; fetch the file again$"):
        read_index(tmp_path)


def test_index_that_names_another_file(tmp_path: Path) -> None:
    for name, tensor in (("x", "a"), ("y", "b")):
        header = {tensor: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
        (tmp_path / f"{name}.safetensors").write_bytes(pack(header, b"1"))
    places = {"a": "x.safetensors", "b": "y.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    assert list(read_index(tmp_path)) == ["a", "b"]
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": places | {"b": "x.safetensors"}}))
    with pytest.raises(ValueError, match=r"tensor b: .* says it is in x\.safetensors, where it is not"):
        read_index(tmp_path)


def test_import_of_a_damaged_header_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two neighbours trade a byte: shapes still fit config.json, and every number behind is another."""
    write_checkpoint(tmp_path / "hf", small_m2(), M2_NAMING, dtype=torch.float32, shard_bytes=10**9)
    path = tmp_path / "hf" / SINGLE_NAME
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name.endswith("lm_head.weight"))
    header[name]["data_offsets"] = [at - 4 for at in header[name]["data_offsets"]]
    path.write_bytes(pack(header, content[8 + length :]))
    assert convert.main(["import", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 2
    assert "is not a safetensors file (tensor " in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()

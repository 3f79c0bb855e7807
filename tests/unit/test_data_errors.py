"""Each mistake is one line that names the setting, the rule and the way out."""

import bz2
import gzip
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from msa_train.config import DataConfig
from msa_train.data import corpus, lines, load_datasets, prepare, prepare_corpus
from msa_train.data.lines import BoundError, iterate_lines
from msa_train.data.sources import Source
from msa_train.data.split import check_labels, choose_held_out, hash_indices
from msa_train.data.store import write_store


def _message(tmp_path: Path, path: object, **settings: object) -> str:
    data = DataConfig(corpus=str(path), cache_dir=str(tmp_path / "cache"), **settings)  # pyright: ignore
    with pytest.raises(ValueError) as caught:
        prepare_corpus(data, vocab_size=257)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data.")
    assert "=" in message
    assert ";" in message, "says what to do"
    return message


def _zip(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def _zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


JSONL_CASES: dict[str, tuple[str, bytes, str]] = {
    "broken": ("c.jsonl", b'{"text": "a"}\n{"text": \n', "c.jsonl:2 is not JSON"),
    "broken_after_blank_lines": ("c.jsonl", b'\n\n{"text": "a"}\nx\n', "c.jsonl:4 is not JSON"),
    "not_utf8": ("c.jsonl", b'{"text": "\xff"}\n', "c.jsonl:1 is not JSON"),
    "no_object": ("c.jsonl", b'["text"]\n', "c.jsonl:1 is not a JSON object"),
    "no_field": ("c.jsonl", b'{"body": "a", "id": 1}\n', "c.jsonl:1 has no field data.text_field=text"),
    "no_field_names_fields": ("c.jsonl", b'{"body": "a", "id": 1}\n', "its fields: body, id"),
    "no_string": ("c.jsonl", b'{"text": null}\n', "c.jsonl:1 has no string in field data.text_field=text"),
    "half_surrogate": ("c.jsonl", b'{"text": "\\ud800"}\n', "c.jsonl:1 holds half of a surrogate pair"),
    "deeply_nested": ("c.jsonl", b"[" * 200_000, "c.jsonl:1 is not JSON"),
    "gz_cut_off": (
        "c.jsonl.gz",
        _zip(b'{"text": "%s"}\n' % os.urandom(999).hex().encode())[:500],
        "c.jsonl.gz:1 cannot be read",
    ),
    "gz_is_none": ("c.jsonl.gz", b'{"text": "a"}\n', "c.jsonl.gz:1 cannot be read"),
    "zst_is_none": ("c.jsonl.zst", b'{"text": "a"}\n', "c.jsonl.zst:1 cannot be read"),
    "zst_cut_off": (
        "c.jsonl.zst",
        zstandard.ZstdCompressor().compress(b'{"text": "%s"}\n' % os.urandom(999).hex().encode())[:500],
        "the file ends in the middle of a frame",
    ),
    "array_in_json": (
        "c.json",
        b'[\n {"text": "a"},\n {"text": "b"}\n]\n',
        "jq -c '.[]' turns an array into that",
    ),
    "one_line_array_in_json": (
        "c.json",
        b'[{"text": "a"}]',
        "c.json:1 is not a JSON object",
    ),
    "one_object_in_json": ("package.json", b'{\n "name": "a"\n}\n', "or call it .txt if it is a text"),
    "case_of_the_ending": ("c.JSONL.GZ", _zip(b'{"text": "a"}\nx'), "c.JSONL.GZ:2 is not JSON"),
    "zst_broken": (
        "c.jsonl.zst",
        zstandard.ZstdCompressor().compress(b'{"text": "a"}\n' * 9) + b"rest",
        "cannot be read",
    ),
}


@pytest.mark.parametrize("case", JSONL_CASES)
def test_jsonl(tmp_path: Path, case: str) -> None:
    name, content, expected = JSONL_CASES[case]
    (tmp_path / name).write_bytes(content)
    assert expected in _message(tmp_path, tmp_path / name)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_line_without_end(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 20)
    content = b'{"text": "a"}\n{"text": "' + b"a" * (3 << 20) + b'"}\n'
    pack = {"": bytes, ".gz": _zip, ".zst": _zst}[suffix]
    (tmp_path / f"c.jsonl{suffix}").write_bytes(pack(content))
    message = _message(tmp_path, tmp_path / f"c.jsonl{suffix}")
    assert f"c.jsonl{suffix}:2 has more than 1 MiB without an end of line" in message


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_many_lines_out_of_nothing(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "RATIO_FREE_BYTES", 1 << 16)
    monkeypatch.setattr(lines, "MAX_RATIO", 50)
    record = b'{"text": "a"}\n'
    pack = {".gz": _zip, ".zst": _zst}[suffix]
    (tmp_path / f"few.jsonl{suffix}").write_bytes(pack(record * 4_000))
    data = DataConfig(corpus=str(tmp_path / f"few.jsonl{suffix}"), cache_dir=str(tmp_path / "cache"))
    assert prepare_corpus(data, vocab_size=257).num_documents == 4_000
    (tmp_path / f"c.jsonl{suffix}").write_bytes(pack(record * 40_000))
    message = _message(tmp_path, tmp_path / f"c.jsonl{suffix}")
    assert "unpacks to more than 50 times its size" in message


def test_what_is_unpacked_comes_in_parts(tmp_path: Path) -> None:
    """Half a gigabyte in one line, packed to kilobytes, takes the memory of a part of it."""
    path = tmp_path / "c.jsonl.zst"
    with open(path, "wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as packed:
        for _ in range(128):
            packed.write(bytes(4 << 20))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        with open(path, "rb") as stream, pytest.raises(BoundError, match="250 times its size"):
            list(iterate_lines(path.name, stream))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # the line so far, and one part, which the library puts together from pieces
    assert peak < lines.RATIO_FREE_BYTES + (2 * 32 << 20) + (16 << 20)


def test_text_beyond_the_bound(tmp_path: Path) -> None:
    with open(tmp_path / "a.txt", "wb") as stream:
        stream.truncate(corpus.MAX_TEXT_BYTES + 1)
    assert "a.txt has 1,073,741,825 bytes in one document" in _message(tmp_path, tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["gzip", "zstd", "bzip2"])
def test_packed_text_is_no_text(tmp_path: Path, kind: str) -> None:
    content = {"gzip": _zip, "zstd": _zst, "bzip2": bz2.compress}[kind](b"text " * 999)
    (tmp_path / "a.txt").write_bytes(content.replace(b"\0", b"\1"))
    assert f"a.txt is not text (it is a {kind} file)" in _message(tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_file_that_changes_while_it_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "a"}\n')
    find = prepare.find_source

    def find_and_change(*arguments: object) -> Source:
        source = find(*arguments)  # pyright: ignore[reportArgumentType]
        with path.open("ab") as stream:
            stream.write(b'{"text": "b"}\n')
        return source

    monkeypatch.setattr(prepare, "find_source", find_and_change)
    assert f"{name} has changed since it was listed; start again" in _message(tmp_path, path)


def _empty_folder(root: Path) -> object:
    return root


def _missing(root: Path) -> object:
    return root / "none.txt"


def _glob_without_match(root: Path) -> object:
    return root / "*.txt"


def _only_empty_files(root: Path) -> object:
    (root / "a.txt").write_bytes(b"")
    (root / "b.jsonl").write_bytes(b'{"text": ""}\n\n')
    return root


def _binary(root: Path) -> object:
    (root / "a.png").write_bytes(b"\x89PNG\0\0")
    return root


def _dangling_link(root: Path) -> object:
    (root / "a.txt").symlink_to(root / "gone")
    return root


def _pipe(root: Path) -> object:
    os.mkfifo(root / "a.txt")
    return root


def _only_bin(root: Path) -> object:
    (root / "c.bin").write_bytes(b"\1\0")
    return root / "c"


def _only_bin_by_name(root: Path) -> object:
    return str(_only_bin(root)) + ".bin"


def _only_idx(root: Path) -> object:
    (root / "c.idx").write_bytes(b"\1\0")
    return root / "c.idx"


def _neither(root: Path) -> object:
    return root / "c.bin"


def _bin_in_a_folder(root: Path) -> object:
    (root / "c.bin").write_bytes(b"\1\0")
    return root


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_empty_folder, "holds no file that is not hidden"),
        (_missing, "none.txt: does not exist"),
        (_glob_without_match, "matches no file"),
        (_only_empty_files, "holds no text"),
        (_binary, "a.png is not text"),
        (_dangling_link, "a.txt cannot be read (No such file"),
        (_pipe, "a.txt is not a regular file"),
        (_only_bin, "c.idx is missing beside the .bin"),
        (_only_bin_by_name, "c.idx is missing beside the .bin"),
        (_only_idx, "c.bin is missing beside the .idx"),
        (_neither, "there is neither"),
        (_bin_in_a_folder, "give the prefix of one .bin/.idx pair"),
    ],
)
def test_corpus(tmp_path: Path, make: Callable[[Path], object], expected: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert expected in _message(tmp_path, make(root))


def _pair(tmp_path: Path) -> Path:
    write_store(str(tmp_path / "c"), [np.arange(100, dtype=np.int32)], vocab_size=100)
    return tmp_path / "c"


def _edit_index(prefix: Path, offset: int, layout: str, value: object) -> None:
    content = bytearray(prefix.with_suffix(".idx").read_bytes())
    struct.pack_into(layout, content, offset, value)
    prefix.with_suffix(".idx").write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "expected"),
    [
        (0, "3s", b"XXX", "no index of Megatron"),
        (9, "<Q", 7, "no index of Megatron"),
        (17, "<B", 6, "holds no integers"),
        (17, "<B", 99, "holds no integers"),
        (18, "<Q", 0, "is empty"),
        (18, "<Q", 10**6, "is cut off"),
        (26, "<Q", 0, "is cut off"),
        (34, "<i", 5000, "is shorter than its .idx says"),
        (38, "<q", 8, "are not in order"),
        (54, "<q", 0, "do not cover its sequences"),
        (34, "<i", 99, "do not belong together"),
        (34, "<i", -1, "do not cover its sequences"),
    ],
)
def test_broken_index(tmp_path: Path, offset: int, layout: str, value: object, expected: str) -> None:
    prefix = _pair(tmp_path)
    _edit_index(prefix, offset, layout, value)
    assert expected in _message(tmp_path, prefix)


@pytest.mark.parametrize(
    ("file", "more", "expected"),
    [
        (".bin", 2, "c.bin has 202 bytes, and its .idx speaks of 200: they do not belong together"),
        (".bin", -2, "c.bin is shorter than its .idx says (198 bytes, 200)"),
        (".idx", 1, "has modes, for several kinds of sequences"),
        (".idx", 2, "c.idx has 64 bytes, 62 by its own numbers"),
        (".idx", -1, "is cut off"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path: Path, file: str, more: int, expected: str) -> None:
    path = _pair(tmp_path).with_suffix(file)
    content = path.read_bytes()
    path.write_bytes(content + bytes(more) if more > 0 else content[:more])
    assert expected in _message(tmp_path, tmp_path / "c")


def test_pairs_of_other_lengths_and_types_are_told_apart(tmp_path: Path) -> None:
    for name, count, vocab_size in (("a", 100, 100), ("b", 101, 100), ("d", 100, 100_000)):
        write_store(str(tmp_path / name), [np.arange(count, dtype=np.int32)], vocab_size=vocab_size)
    for mine, other in (("a", "b"), ("b", "a"), ("a", "d"), ("d", "a")):
        (tmp_path / "c.bin").write_bytes((tmp_path / f"{mine}.bin").read_bytes())
        (tmp_path / "c.idx").write_bytes((tmp_path / f"{other}.idx").read_bytes())
        assert "c.bin" in _message(tmp_path, tmp_path / "c")


@pytest.mark.parametrize("count", [1, 600])
def test_nothing_to_predict(tmp_path: Path, count: int) -> None:
    write_store(str(tmp_path / "c"), [np.ones(1, np.int32)] * count, vocab_size=100)
    assert "to train on has two tokens, so there is nothing to predict" in _message(tmp_path, tmp_path / "c")


@pytest.mark.parametrize("side", ["to train on", "held-out"])
def test_nothing_to_predict_on_one_side(tmp_path: Path, side: str) -> None:
    """Lengths follow the side on which the hash of its number puts a document."""
    held_out = choose_held_out(hash_indices(1000), np.ones(1000, np.int64), 0.3)
    lengths = np.where(held_out == (side == "held-out"), 1, 2)
    write_store(str(tmp_path / "c"), [np.ones(length, np.int32) for length in lengths], vocab_size=100)
    message = _message(tmp_path, tmp_path / "c", validation_fraction=0.3)
    assert f" {side}" in message
    assert "has two tokens" in message


def test_labels_of_both_sides() -> None:
    hashes, lengths = hash_indices(9), np.ones(9, np.int64)
    with pytest.raises(ValueError, match="none of the 8 documents to train on has two tokens"):
        check_labels("c", hashes, lengths, fraction=0.1)
    assert check_labels("c", hashes, 2 * lengths, fraction=0.1) == 1
    assert check_labels("c", hashes, 2 * lengths, fraction=0) == 0


def test_bin_without_tokens(tmp_path: Path) -> None:
    prefix = _pair(tmp_path)
    prefix.with_suffix(".bin").write_bytes(b"")
    assert "is empty" in _message(tmp_path, prefix)
    prefix.with_suffix(".idx").write_bytes(b"")
    assert "no index of Megatron" in _message(tmp_path, prefix)


@pytest.mark.parametrize(("token", "expected"), [(257, "token id 257"), (-3, "negative token id -3")])
def test_ids_outside_the_vocabulary(tmp_path: Path, token: int, expected: str) -> None:
    tokens = np.arange(256, dtype=np.int32)
    tokens[-1] = token
    write_store(str(tmp_path / "c"), [tokens], vocab_size=100_000)
    message = _message(tmp_path, tmp_path / "c")
    assert expected in message
    data = DataConfig(corpus=str(tmp_path / "c"), seq_len=64)
    with pytest.raises(ValueError, match=expected):
        load_datasets(data, block_size=16, vocab_size=257)


def test_message_names_the_value(tmp_path: Path) -> None:
    assert _message(tmp_path, "/nowhere").startswith("data.corpus=/nowhere: does not exist; ")

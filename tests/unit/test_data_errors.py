"""Each mistake is one line that names the setting, the rule and the way out."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from msa_train.config import DataConfig
from msa_train.data import load_datasets
from msa_train.data.token_cache.store import write_store
from tests.helpers.data_messages import refusal


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
    assert expected in refusal(tmp_path, tmp_path / name)


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
    assert expected in refusal(tmp_path, make(root))


@pytest.mark.parametrize(("token", "expected"), [(257, "token id 257"), (-3, "negative token id -3")])
def test_ids_outside_the_vocabulary(tmp_path: Path, token: int, expected: str) -> None:
    tokens = np.arange(256, dtype=np.int32)
    tokens[-1] = token
    write_store(str(tmp_path / "c"), [tokens], vocab_size=100_000)
    message = refusal(tmp_path, tmp_path / "c")
    assert expected in message
    data = DataConfig(corpus=str(tmp_path / "c"), seq_len=64)
    with pytest.raises(ValueError, match=expected):
        load_datasets(data, block_size=16, vocab_size=257)


def test_message_names_the_value(tmp_path: Path) -> None:
    assert refusal(tmp_path, "/nowhere").startswith("data.corpus=/nowhere: does not exist; ")

"""Pairs of .bin and .idx: broken, of different origin, or with nothing to predict."""

import struct
from pathlib import Path

import numpy as np
import pytest

from msa_train.data.split import check_labels, choose_held_out, hash_indices
from msa_train.data.token_cache.store import write_store
from tests.helpers.data_messages import refusal


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
    assert expected in refusal(tmp_path, prefix)


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
    assert expected in refusal(tmp_path, tmp_path / "c")


def test_pairs_of_other_lengths_and_types_are_told_apart(tmp_path: Path) -> None:
    for name, count, vocab_size in (("a", 100, 100), ("b", 101, 100), ("d", 100, 100_000)):
        write_store(str(tmp_path / name), [np.arange(count, dtype=np.int32)], vocab_size=vocab_size)
    for mine, other in (("a", "b"), ("b", "a"), ("a", "d"), ("d", "a")):
        (tmp_path / "c.bin").write_bytes((tmp_path / f"{mine}.bin").read_bytes())
        (tmp_path / "c.idx").write_bytes((tmp_path / f"{other}.idx").read_bytes())
        assert "c.bin" in refusal(tmp_path, tmp_path / "c")


@pytest.mark.parametrize("count", [1, 600])
def test_nothing_to_predict(tmp_path: Path, count: int) -> None:
    write_store(str(tmp_path / "c"), [np.ones(1, np.int32)] * count, vocab_size=100)
    assert "to train on has two tokens, so there is nothing to predict" in refusal(tmp_path, tmp_path / "c")


@pytest.mark.parametrize("side", ["to train on", "held-out"])
def test_nothing_to_predict_on_one_side(tmp_path: Path, side: str) -> None:
    """Lengths follow the side on which the hash of its number puts a document."""
    held_out = choose_held_out(hash_indices(1000), np.ones(1000, np.int64), 0.3)
    lengths = np.where(held_out == (side == "held-out"), 1, 2)
    write_store(str(tmp_path / "c"), [np.ones(length, np.int32) for length in lengths], vocab_size=100)
    message = refusal(tmp_path, tmp_path / "c", validation_fraction=0.3)
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
    assert "is empty" in refusal(tmp_path, prefix)
    prefix.with_suffix(".idx").write_bytes(b"")
    assert "no index of Megatron" in refusal(tmp_path, prefix)

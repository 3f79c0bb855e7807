"""Files that nobody can have meant as a corpus: bounds, packed texts, changes while they are read."""

import bz2
import gzip
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from msa_train.config import DataConfig
from msa_train.data import prepare, prepare_corpus
from msa_train.data.corpora import documents as corpus
from msa_train.data.corpora import lines
from msa_train.data.corpora.lines import BoundError, iterate_lines
from msa_train.data.corpora.sources import Source
from tests.helpers.data_messages import refusal


def _zip(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def _zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_line_without_end(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 20)
    content = b'{"text": "a"}\n{"text": "' + b"a" * (3 << 20) + b'"}\n'
    pack = {"": bytes, ".gz": _zip, ".zst": _zst}[suffix]
    (tmp_path / f"c.jsonl{suffix}").write_bytes(pack(content))
    message = refusal(tmp_path, tmp_path / f"c.jsonl{suffix}")
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
    message = refusal(tmp_path, tmp_path / f"c.jsonl{suffix}")
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
    assert "a.txt has 1,073,741,825 bytes in one document" in refusal(tmp_path, tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["gzip", "zstd", "bzip2"])
def test_packed_text_is_no_text(tmp_path: Path, kind: str) -> None:
    content = {"gzip": _zip, "zstd": _zst, "bzip2": bz2.compress}[kind](b"text " * 999)
    (tmp_path / "a.txt").write_bytes(content.replace(b"\0", b"\1"))
    assert f"a.txt is not text (it is a {kind} file)" in refusal(tmp_path, tmp_path)


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
    assert f"{name} has changed since it was listed; start again" in refusal(tmp_path, path)

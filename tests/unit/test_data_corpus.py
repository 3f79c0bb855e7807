"""Every kind of corpus, from real files."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import zstandard

from msa_train.config import DataConfig
from msa_train.data import load_datasets, prepare_corpus
from msa_train.data.corpora.documents import iterate_documents
from msa_train.data.corpora.sources import find_source
from msa_train.data.token_cache.store import TokenStore

EOD = 256


def _data(tmp_path: Path, corpus: object, **settings: object) -> DataConfig:
    return DataConfig(corpus=str(corpus), cache_dir=str(tmp_path / "cache"), **settings)  # pyright: ignore


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _texts(tmp_path: Path, corpus: object, **settings: object) -> list[bytes]:
    """Prepare a corpus and read its documents back from the token file."""
    prepared = prepare_corpus(_data(tmp_path, corpus, **settings), vocab_size=257)
    store = TokenStore(prepared.prefix, corpus=str(corpus))
    assert store.num_documents == prepared.num_documents
    assert store.num_tokens == prepared.num_tokens
    documents = [store.read(int(a), int(n)) for a, n in zip(store.begin, store.lengths, strict=True)]
    assert all(document[-1] == EOD for document in documents)
    texts = [document[:-1].astype(np.uint8).tobytes() for document in documents]
    assert prepared.num_bytes == sum(map(len, texts))
    assert prepared.bytes_per_token == 1.0
    return texts


def test_folder(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    _write(root / "b.txt", b"bee")
    _write(root / "a" / "deep.md", "\u00fcber".encode("latin-1"))
    _write(root / "c.jsonl", b'{"text": "one"}\n\n{"text": "two"}')
    _write(root / "empty.txt", b"")
    _write(root / ".hidden", b"no")
    _write(root / ".git" / "config", b"no")
    assert _texts(tmp_path, root) == [b"\xfcber", b"bee", b"one", b"two"]


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    _write(tmp_path / "elsewhere" / "a.txt", b"linked")
    root = tmp_path / "texts"
    _write(root / "b.txt", b"own")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "circle").symlink_to(root)
    assert _texts(tmp_path, root) == [b"own", b"linked"]


def test_single_file_and_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "texts"
    for name in ("a.py", "b.txt", "sub/c.py"):
        _write(root / name, name.encode())
    assert _texts(tmp_path, root / "b.txt") == [b"b.txt"]
    assert _texts(tmp_path, root / "*.py") == [b"a.py"]
    assert _texts(tmp_path, root / "**" / "*.py") == [b"a.py", b"sub/c.py"]
    monkeypatch.chdir(root)
    assert _texts(tmp_path, "*.txt") == [b"b.txt"]


def test_glob_characters_in_a_real_name(tmp_path: Path) -> None:
    assert _texts(tmp_path, _write(tmp_path / "a[1].txt", b"found")) == [b"found"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    texts = [f"text {i} \u20ac\U0001f600 " + "x" * (i % 700) for i in range(2000)]
    content = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(texts)).encode()
    if suffix == ".gz":
        half = content.index(b"\n", len(content) // 2) + 1
        content = gzip.compress(content[:half]) + gzip.compress(content[half:])
    if suffix == ".zst":
        half = content.index(b"\n", len(content) // 2) + 1
        compress = zstandard.ZstdCompressor().compress
        content = compress(content[:half]) + compress(content[half:])
    path = _write(tmp_path / f"c.jsonl{suffix}", content)
    assert _texts(tmp_path, path, text_field="body") == [text.encode() for text in texts]


def test_names_do_not_depend_on_the_place_of_the_corpus(tmp_path: Path) -> None:
    names: list[list[str]] = []
    for place in ("one", "two/deeper"):
        _write(tmp_path / place / "a.txt", b"a")
        _write(tmp_path / place / "sub" / "b.jsonl", b'{"text": "b"}\n')
        source = find_source(str(tmp_path / place))
        names.append([name for name, _ in iterate_documents(source, text_field="text", needs_utf8=False)])
    assert names == [["a.txt", "sub/b.jsonl:1"]] * 2


def test_standard_library(tmp_path: Path) -> None:
    data = _data(tmp_path, "stdlib")
    prepared = prepare_corpus(data, vocab_size=257)
    assert prepared.num_tokens > 5_000_000
    source = find_source("stdlib")
    assert not any("site-packages" in file.path for file in source.files)
    documents = dict(iterate_documents(source, text_field="text", needs_utf8=False))
    assert len(documents) == prepared.num_documents
    assert documents["asyncio"].startswith(b"# file: asyncio/__init__.py\n")
    assert b"# file: asyncio/tasks.py\n" in documents["asyncio"]
    assert b"# file: abc.py\n" in documents["modules/a"]
    assert all(text.decode("utf-8") for text in documents.values())
    train, validation, _ = load_datasets(data, block_size=128, vocab_size=257)
    assert validation is not None
    assert train.num_tokens + validation.num_tokens == prepared.num_tokens
    assert 0.025 < validation.num_tokens / prepared.num_tokens < 0.1
    assert train.padding_share < 0.05


def test_megatron_pair_in_place(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path / "own_text_document")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    builder.add_document(np.arange(10), [4, 6])  # pyright: ignore[reportArgumentType]
    builder.add_document(np.arange(10, 13), [3])  # pyright: ignore[reportArgumentType]
    builder.finalize(prefix + ".idx")
    before = sorted(os.listdir(tmp_path))
    for corpus in (prefix, prefix + ".bin", prefix + ".idx"):
        data = _data(tmp_path, corpus, seq_len=16, validation_fraction=0.5)
        prepared = prepare_corpus(data, vocab_size=13)
        assert (prepared.prefix, prepared.num_documents, prepared.num_tokens) == (prefix, 2, 13)
        assert prepared.num_bytes is None
        assert prepared.bytes_per_token is None
        train, validation, _ = load_datasets(data, block_size=4, vocab_size=13)
        assert validation is not None
        lengths = sorted(int(d[0].doc_lengths[0]) for d in (train, validation))
        assert lengths == [3, 10], "a document of two sequences is one document"
    assert sorted(os.listdir(tmp_path)) == before


def test_own_token_files_are_readable_by_megatron(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prepared = prepare_corpus(_data(tmp_path, _write(tmp_path / "a.txt", b"hi")), vocab_size=257)
    dataset = IndexedDataset(prepared.prefix)
    assert np.asarray(dataset[0]).tolist() == [104, 105, EOD]
    assert np.asarray(dataset[0]).dtype == np.uint16

"""From the data settings to packs: find or build the token files, split them, pack them."""

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from msa_train.config import DataConfig
from msa_train.data.corpus import iterate_documents
from msa_train.data.dataset import PackedDataset
from msa_train.data.sources import Source, corpus_error, find_indexed, find_source
from msa_train.data.split import choose_held_out, hash_indices, hash_name, split_store
from msa_train.data.store import TokenStore, write_store
from msa_train.data.tokenizer import Tokenizer, build_tokenizer

_FORMAT = 1
"part of every cache key; raise it when the files' content or meaning changes"
_BATCH_BYTES = 16 << 20
_REPORT_EVERY_S = 30.0

Log = Callable[[str], None]


@dataclass(kw_only=True, slots=True)
class Corpus:
    """What was prepared."""

    prefix: str
    "path of the .bin/.idx pair, without suffix"
    num_documents: int
    num_tokens: int
    "with the end-of-document tokens"
    num_bytes: int | None
    "of text; None if the corpus is a .bin/.idx"
    bytes_per_token: float | None
    "bytes per label, over the held-out documents if there are any; loss / ln 2 / this is bits per byte"
    tokenizer_vocab_size: int | None
    "rows that the tokenizer needs; None if the corpus is a .bin/.idx"
    description: str


@dataclass(slots=True)
class _Documents:
    """Parallel arrays over the documents of a corpus of text, kept beside the tokens."""

    hashes: npt.NDArray[np.uint64]
    num_bytes: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]


def prepare_corpus(data: DataConfig, *, vocab_size: int, log: Log | None = None) -> Corpus:
    """Check the data settings and build the token files if they are missing.

    Called once before the workers start; harmless when repeated, also by several processes at once.

    Args:
        data: the settings.
        vocab_size: rows of the embedding.
        log: gets one line per event.

    Raises:
        ValueError: one line naming the setting, what is wrong and the fix.
    """
    log = log or _ignore
    prefix = None if data.corpus == "stdlib" else find_indexed(data.corpus)
    if prefix is None:
        return _prepare_text(data, vocab_size, log)[0]
    if data.tokenizer != "bytes":
        log(f"data.tokenizer={data.tokenizer}: ignored, data.corpus={data.corpus} is tokenized already")
    corpus = _describe_indexed(prefix, TokenStore(prefix, corpus=data.corpus), data.corpus, vocab_size)
    log(corpus.description)
    return corpus


def load_datasets(
    data: DataConfig, *, block_size: int, vocab_size: int
) -> tuple[PackedDataset, PackedDataset | None, Corpus]:
    """Training packs, validation packs (None if nothing is held out) and the corpus.

    Called by every worker after `prepare_corpus`; reads the files' times and sizes again, but not the files.

    Raises:
        ValueError: one line naming the setting, what is wrong and the fix.
    """
    prefix = None if data.corpus == "stdlib" else find_indexed(data.corpus)
    if prefix is None:
        corpus, documents = _prepare_text(data, vocab_size, _ignore)
        store, hashes = TokenStore(corpus.prefix, corpus=data.corpus), documents.hashes
    else:
        store = TokenStore(prefix, corpus=data.corpus)
        corpus, hashes = (
            _describe_indexed(prefix, store, data.corpus, vocab_size),
            hash_indices(store.num_documents),
        )
    train, validation = split_store(store, hashes, fraction=data.validation_fraction, vocab_size=vocab_size)
    train_packs, validation_packs = (
        view and PackedDataset(view, seq_len=data.seq_len, block_size=block_size, seed=data.seed)
        for view in (train, validation)
    )
    assert train_packs is not None, "a corpus has at least one document to train on"
    return train_packs, validation_packs, corpus


def _describe_indexed(prefix: str, store: TokenStore, corpus: str, vocab_size: int) -> Corpus:
    if store.num_tokens == 0:
        raise corpus_error(corpus, f"{prefix}.bin is empty; give a corpus with at least one token")
    largest = store.check_sample(vocab_size)
    return Corpus(
        prefix=prefix,
        num_documents=store.num_documents,
        num_tokens=store.num_tokens,
        num_bytes=None,
        bytes_per_token=None,
        tokenizer_vocab_size=None,
        description=f"{prefix}.bin/.idx: {store.num_documents:,} documents, {store.num_tokens:,} tokens, "
        f"ids up to {largest} in a sample",
    )


def _prepare_text(data: DataConfig, vocab_size: int, log: Log) -> tuple[Corpus, _Documents]:
    tokenizer = build_tokenizer(data)
    if tokenizer.vocab_size > vocab_size:
        enough = -(-tokenizer.vocab_size // 64) * 64
        raise ValueError(
            f"data.tokenizer={data.tokenizer}: needs {tokenizer.vocab_size} rows, "
            f"model.vocab_size={vocab_size} is too small; use model.vocab_size={enough}"
        )
    source = find_source(data.corpus)
    folder = _cache_root(data) / _cache_key(data, source, tokenizer)
    if not folder.exists():
        log(f"tokenizing {source.description}, {source.num_bytes / 1e6:.1f} MB, into {folder}")
        _build(data, source, tokenizer, folder, log)
    corpus, documents = _read_cache(data, folder, source, tokenizer)
    log(corpus.description)
    return corpus, documents


def _cache_root(data: DataConfig) -> Path:
    root = Path(data.cache_dir).expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={data.cache_dir}: cannot be created ({error.strerror}); "
            "give a folder that can be written to"
        ) from error
    return root


def _cache_key(data: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    parts = [_FORMAT, source.is_stdlib, source.fingerprint(), tokenizer.fingerprint, data.text_field]
    return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()[:24]


def _build(data: DataConfig, source: Source, tokenizer: Tokenizer, folder: Path, log: Log) -> None:
    """Write the token files beside `folder` and move them there in one step.

    Of several processes that do so at once, the first to finish wins; what the others wrote is the same.
    """
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir()
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={data.cache_dir}: cannot be written ({error.strerror}); give another folder"
        ) from error
    try:
        _write_files(data, source, tokenizer, partial, log)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(data: DataConfig, source: Source, tokenizer: Tokenizer, folder: Path, log: Log) -> None:
    hashes: list[int] = []
    num_bytes: list[int] = []
    num_tokens: list[int] = []

    def documents() -> Iterator[npt.NDArray[np.int32]]:
        for names, texts in _batches(data, source, tokenizer, log):
            for name, text, tokens in zip(names, texts, tokenizer.encode_batch(texts), strict=True):
                hashes.append(hash_name(name))
                num_bytes.append(len(text))
                num_tokens.append(len(tokens) + 1)
                yield np.append(tokens, np.int32(tokenizer.eod_id))

    write_store(str(folder / "corpus"), documents(), vocab_size=tokenizer.vocab_size)
    findings = tokenizer.findings()
    for line in findings:
        log(line)
    if not hashes:
        raise corpus_error(data.corpus, "holds no text, all documents are empty; give another path")
    np.savez(
        folder / "documents.npz",
        hashes=np.array(hashes, np.uint64),
        num_bytes=np.array(num_bytes, np.int64),
        num_tokens=np.array(num_tokens, np.int64),
    )
    summary = {
        "format": _FORMAT,
        "source": source.description,
        "num_documents": len(hashes),
        "num_tokens": sum(num_tokens),
        "num_bytes": sum(num_bytes),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "eod_id": tokenizer.eod_id,
        "findings": findings,
    }
    (folder / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _batches(
    data: DataConfig, source: Source, tokenizer: Tokenizer, log: Log
) -> Iterator[tuple[list[str], list[bytes]]]:
    """Documents that are not empty, in batches large enough to keep the tokenizer's threads busy."""
    names: list[str] = []
    texts: list[bytes] = []
    batch_bytes = total_bytes = total_documents = 0
    next_report = time.monotonic() + _REPORT_EVERY_S
    for name, text in iterate_documents(source, text_field=data.text_field, needs_utf8=tokenizer.needs_utf8):
        if not text:
            continue
        names.append(name)
        texts.append(text)
        batch_bytes += len(text)
        if batch_bytes >= _BATCH_BYTES:
            yield names, texts
            total_bytes, total_documents = total_bytes + batch_bytes, total_documents + len(names)
            names, texts, batch_bytes = [], [], 0
            if time.monotonic() >= next_report:
                log(f"tokenized {total_documents:,} documents, {total_bytes / 1e6:.0f} MB")
                next_report = time.monotonic() + _REPORT_EVERY_S
    if names:
        yield names, texts


def _read_cache(
    data: DataConfig, folder: Path, source: Source, tokenizer: Tokenizer
) -> tuple[Corpus, _Documents]:
    try:
        with np.load(folder / "documents.npz") as arrays:
            documents = _Documents(arrays["hashes"], arrays["num_bytes"], arrays["num_tokens"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"data.cache_dir={data.cache_dir}: {folder} is damaged; remove it") from error
    num_documents, num_tokens = len(documents.hashes), int(documents.num_tokens.sum())
    num_bytes = int(documents.num_bytes.sum())
    return Corpus(
        prefix=str(folder / "corpus"),
        num_documents=num_documents,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        bytes_per_token=_bytes_per_label(documents, data.validation_fraction),
        tokenizer_vocab_size=tokenizer.vocab_size,
        description=f"{source.description}: {num_documents:,} documents, {num_tokens:,} tokens, "
        f"{num_bytes / 1e6:.1f} MB of text",
    ), documents


def _bytes_per_label(documents: _Documents, fraction: float) -> float | None:
    """Bytes of text per position that has a label; a document has one label less than tokens."""
    counted = choose_held_out(documents.hashes, documents.num_tokens, fraction)
    if not counted.any():
        counted = np.ones_like(counted)
    num_labels = int((documents.num_tokens[counted] - 1).sum())
    return int(documents.num_bytes[counted].sum()) / num_labels if num_labels else None


def _ignore(line: str) -> None:
    """Log that goes nowhere."""

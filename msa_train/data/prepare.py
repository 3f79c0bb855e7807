"""Prepare the data settings for training: find or build the token files, and check them."""

import os
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from msa_train.config import DataConfig
from msa_train.data.corpora.documents import iterate_made
from msa_train.data.corpora.sources import INDEXED_SUFFIXES, Source, find_indexed, find_source
from msa_train.data.errors import corpus_error
from msa_train.data.split import check_labels, choose_held_out, hash_indices, hash_name
from msa_train.data.token_cache.cache import (
    DOCUMENTS_NAME,
    Documents,
    build,
    cache_key,
    cache_root,
    check_cache,
    read_documents,
    read_findings,
    write_documents,
    write_makings,
)
from msa_train.data.token_cache.store import TokenStore, write_store
from msa_train.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from msa_train.runtime.checksums import digest, file_crc32, sample_crc32

# enough texts for every core's thread of the tokenizer
_BATCH_BYTES = 16 << 20
_REPORT_EVERY_S = 30.0

Log = Callable[[str], None]


@dataclass(kw_only=True, slots=True)
class Corpus:
    """Describe what was prepared."""

    prefix: str
    "path of the .bin/.idx pair, without suffix"
    num_documents: int
    "in all, held-out ones included"
    num_tokens: int
    "with the end-of-document tokens"
    num_bytes: int | None
    "of text; None if the corpus is a .bin/.idx"
    bytes_per_token: float | None
    "bytes per label, over the held-out documents if there are any; loss / ln 2 / this is bits per byte"
    tokenizer_vocab_size: int | None
    "rows that the tokenizer needs; None if the corpus is a .bin/.idx"
    tokenizer: str | None
    "changes when any token id can change; None if the corpus is a .bin/.idx"
    content: str
    "changes when any token, or the name of any document, does; copies elsewhere have the same"
    sizes: dict[str, int]
    "bytes of each file beside the prefix, by name"
    description: str
    "one line for the log"
    sources: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    "of a mixture: the same of each of its sources, by name"

    def source(self, name: str) -> "Corpus":
        """Return what was prepared of one source of a mixture."""
        return Corpus(**self.sources[name])


def prepare_corpus(data: DataConfig, *, vocab_size: int, log: Log | None = None, run_dir: str = "") -> Corpus:
    """Check the data settings and build the token files if they are missing.

    Called once before the workers start; harmless when repeated, also by several processes at once. A text is
    read and tokenized once: batches of 16 MB are in memory, and 24 bytes per document; the files take 2 bytes
    per token (4 from 65,500 ids on), and 44 per document in .idx and documents.dat.

    Args:
        data: the settings.
        vocab_size: rows of the embedding.
        log: gets one line per event.
        run_dir: of the run that is prepared, which is no data even if it lies inside the corpus.

    Raises:
        ValueError: one line naming the setting, what is wrong and the fix.
    """
    log = log or _ignore
    prefix = None if data.corpus == "stdlib" else find_indexed(data.corpus)
    if prefix is None:
        # the corpus may be a folder that holds this run's own files, which are no text to train on
        own = [folder for folder in (os.path.expanduser(data.cache_dir), run_dir) if folder]
        return _prepare_text(data, vocab_size, log, own)
    if data.tokenizer != "bytes":
        log(f"data.tokenizer={data.tokenizer}: ignored, data.corpus={data.corpus} is tokenized already")
    prefix = os.path.abspath(prefix)
    corpus = _describe_indexed(data, TokenStore(prefix, corpus=data.corpus), vocab_size)
    log(corpus.description)
    return corpus


def _describe_indexed(data: DataConfig, store: TokenStore, vocab_size: int) -> Corpus:
    prefix = store.prefix
    if store.num_tokens == 0:
        raise corpus_error(data.corpus, f"{prefix}.bin is empty; give a corpus with at least one token")
    # a sample now, every id when it is read: a terabyte is not read twice
    largest = store.check_sample(vocab_size)
    held_out = check_labels(
        data.corpus, hash_indices(store.num_documents), store.lengths, fraction=data.validation_fraction
    )
    sizes = {
        os.path.basename(prefix + suffix): os.path.getsize(prefix + suffix) for suffix in INDEXED_SUFFIXES
    }
    return Corpus(
        prefix=prefix,
        num_documents=store.num_documents,
        num_tokens=store.num_tokens,
        num_bytes=None,
        bytes_per_token=None,
        tokenizer_vocab_size=None,
        tokenizer=None,
        content=digest([*sizes.values(), file_crc32(prefix + ".idx"), sample_crc32(prefix + ".bin")]),
        sizes=sizes,
        description=f"{prefix}.bin/.idx: {store.num_documents:,} documents, {store.num_tokens:,} tokens, "
        f"ids up to {largest} in a sample{_held_out_words(data, held_out)}",
    )


def _prepare_text(data: DataConfig, vocab_size: int, log: Log, own: list[str]) -> Corpus:
    tokenizer = build_tokenizer(data)
    if tokenizer.vocab_size > vocab_size:
        # a multiple of 64 rows divides well over tensor-parallel ranks and matrix tiles
        enough = -(-tokenizer.vocab_size // 64) * 64
        raise ValueError(
            f"data.tokenizer={data.tokenizer}: needs {tokenizer.vocab_size} rows, "
            f"model.vocab_size={vocab_size} is too small; use model.vocab_size={enough}"
        )
    source = find_source(data.corpus, own)
    folder = cache_root(data) / cache_key(data, source, tokenizer)
    # the folder appears whole, so its being there is enough
    is_cached = folder.exists()
    if not is_cached:
        log(f"tokenizing {source.description}, {source.num_bytes / 1e6:.1f} MB, into {folder}")
        build(data, folder, lambda partial: _write_files(data, source, tokenizer, partial, log))
    corpus = _read_cache(data, folder, source, tokenizer)
    for line in read_findings(folder) if is_cached else []:
        log(line)
    log(corpus.description)
    return corpus


def _write_files(
    data: DataConfig, source: Source, tokenizer: Tokenizer, folder: Path, log: Log
) -> dict[str, Any]:
    # lists of Python's numbers would take 120 bytes for a document instead of 24
    hashes, num_bytes, num_tokens, makings = array("Q"), array("q"), array("q"), array("B")

    def documents() -> Iterator[npt.NDArray[np.int32]]:
        # counts grow while the store is written, so that the text is tokenized once
        for names, texts, made_by in _batches(data, source, tokenizer, log):
            makings.extend(made_by)
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
    arrays = (np.array(hashes, np.uint64), np.array(num_bytes, np.int64), np.array(num_tokens, np.int64))
    write_documents(folder / DOCUMENTS_NAME, Documents(*arrays))
    write_makings(folder, np.array(makings, np.uint8))
    return {
        "source": source.description,
        "num_documents": len(hashes),
        "num_tokens": sum(num_tokens),
        "num_bytes": sum(num_bytes),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "eod_id": tokenizer.eod_id,
        "findings": findings,
    }


def _batches(
    data: DataConfig, source: Source, tokenizer: Tokenizer, log: Log
) -> Iterator[tuple[list[str], list[bytes], list[int]]]:
    """Yield documents that are not empty, in batches large enough to keep the tokenizer's threads busy."""
    names: list[str] = []
    texts: list[bytes] = []
    made_by: list[int] = []
    batch_bytes = total_bytes = total_documents = 0
    next_report = time.monotonic() + _REPORT_EVERY_S
    documents = iterate_made(source, text_field=data.text_field, needs_utf8=tokenizer.needs_utf8)
    for name, text, making in documents:
        if not text:
            continue
        names.append(name)
        texts.append(text)
        made_by.append(making)
        batch_bytes += len(text)
        if batch_bytes >= _BATCH_BYTES:
            yield names, texts, made_by
            total_bytes, total_documents = total_bytes + batch_bytes, total_documents + len(names)
            names, texts, made_by, batch_bytes = [], [], [], 0
            if time.monotonic() >= next_report:
                log(f"tokenized {total_documents:,} documents, {total_bytes / 1e6:.0f} MB")
                next_report = time.monotonic() + _REPORT_EVERY_S
    if names:
        yield names, texts, made_by


def _read_cache(data: DataConfig, folder: Path, source: Source, tokenizer: Tokenizer) -> Corpus:
    content, sizes = check_cache(data, folder)
    documents = read_documents(folder)
    held_out = check_labels(
        data.corpus, documents.hashes, documents.num_tokens, fraction=data.validation_fraction
    )
    num_documents, num_tokens = len(documents.hashes), int(documents.num_tokens.sum())
    num_bytes = int(documents.num_bytes.sum())
    return Corpus(
        prefix=str(folder / "corpus"),
        num_documents=num_documents,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        bytes_per_token=_bytes_per_label(documents, data.validation_fraction),
        tokenizer_vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        content=content,
        sizes=sizes,
        description=f"{source.description}: {num_documents:,} documents, {num_tokens:,} tokens, "
        f"{num_bytes / 1e6:.1f} MB of text{_held_out_words(data, held_out)}",
    )


def _bytes_per_label(documents: Documents, fraction: float) -> float | None:
    """Return the bytes of text per position that has a label; a document has one label less than tokens.

    Example: one document of 9 bytes is held out, in 4 tokens (the end included) -> 9 / 3 = 3 bytes per label;
    a loss of 2.08 nats per label is then 2.08 / ln 2 / 3 = 1 bit per byte.
    """
    counted = choose_held_out(documents.hashes, documents.num_tokens, fraction)
    # the loss that is turned into bits per byte is that of validation, where there is one
    if not counted.any():
        counted = np.ones_like(counted)
    # ln 2 nats are a bit: loss / ln 2 / (bytes per label) is bits per byte, whatever the tokenizer
    num_labels = int((documents.num_tokens[counted] - 1).sum())
    return int(documents.num_bytes[counted].sum()) / num_labels if num_labels else None


def _held_out_words(data: DataConfig, held_out: int) -> str:
    return "" if held_out or not data.validation_fraction else "; too little to hold anything out"


def _ignore(line: str) -> None:
    """Drop a line of the log."""

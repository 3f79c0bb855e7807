"""Write and read token files: Megatron's .bin/.idx pairs, by Megatron-core's own classes.

Format (megatron.core.datasets.indexed_dataset): the .bin holds token ids one after another, uint16 below
65,500 ids, else int32. The .idx, little-endian: magic (9 bytes), version 1 (uint64), code of the integer type
(uint8), number of sequences and of document edges (uint64 each), together 34 bytes; then a length (int32) and
a pointer in bytes (int64) per sequence, and an edge (int64) per document and one more. Example: documents of
3 and 2 tokens: .bin 10 bytes, .idx 34 + 2 * 12 + 3 * 8 = 82 bytes.

Megatron is imported inside functions: it takes seconds, and finding a prepared corpus does not need it.
"""

import os
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from msa_train.data.errors import corpus_error

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INTEGER_CODES = {1, 2, 3, 4, 5, 8}
"Megatron's codes of integer types; 6 and 7 are floats"
_MAX_SEQUENCE_TOKENS = 2**31 - 1
"lengths are int32 in an .idx"
_SAMPLE_WINDOWS, _SAMPLE_TOKENS = 64, 1 << 16


class TokenStore:
    """Read the documents of a .bin/.idx pair, memory-mapped; 16 bytes per document are in memory.

    Attributes:
        corpus: the setting that led here, for messages.
        prefix: path without .bin and .idx.
        begin: [num_documents] int64, first token of each document, counted from the start of the .bin.
        lengths: [num_documents] int64, tokens of each document.

    Example: documents of 3 and 2 tokens -> begin [0, 3], lengths [3, 2].

    Raises:
        ValueError: if the pair is broken or holds no token.
    """

    def __init__(self, prefix: str, *, corpus: str) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        _check_pair(prefix, corpus)
        self.corpus, self.prefix = corpus, prefix
        try:
            with warnings.catch_warnings():
                # newer Megatrons ask for a rank to log by, which a launcher that checks does not have
                warnings.filterwarnings("ignore", message="Could not determine rank")
                self._dataset = IndexedDataset(prefix)
        except AssertionError as error:
            raise self._bad_documents() from error
        index = self._dataset.index
        self._dtype = np.dtype(index.dtype)
        # Copies: Megatron's arrays point into a map that is closed with the data set.
        sequence_ends = np.cumsum(index.sequence_lengths, dtype=np.int64)
        sequence_begins = sequence_ends - index.sequence_lengths
        if not np.array_equal(index.sequence_pointers, sequence_begins * self._dtype.itemsize):
            raise corpus_error(corpus, f"sequences of {prefix}.bin are not in order; write the pair again")
        # a document is one or more sequences: its edges are the token positions of its first sequences
        edges = np.concatenate([[0], sequence_ends])[self._document_indices()]
        self.begin, self.lengths = edges[:-1].copy(), np.diff(edges)
        if np.any(index.sequence_lengths < 0):
            raise self._bad_documents()
        told, size = int(edges[-1]) * self._dtype.itemsize, os.path.getsize(prefix + ".bin")
        if size < told:
            raise corpus_error(
                corpus, f"{prefix}.bin is shorter than its .idx says ({size} bytes, {told}); copy both again"
            )
        if size > told:
            raise corpus_error(
                corpus,
                f"{prefix}.bin has {size} bytes, and its .idx speaks of {told}: they do not belong together; "
                "copy both again",
            )

    def _document_indices(self) -> npt.NDArray[np.int64]:
        indices = np.array(self._dataset.document_indices)
        sound = len(indices) > 1 and indices[0] == 0 and indices[-1] == len(self._dataset)
        if not sound or np.any(np.diff(indices) < 0):
            raise self._bad_documents()
        return indices

    def _bad_documents(self) -> ValueError:
        problem = f"documents of {self.prefix}.idx do not cover its sequences; write the pair again"
        return corpus_error(self.corpus, problem)

    @property
    def num_documents(self) -> int:
        """Count the documents, empty ones included."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Count the tokens of all documents."""
        return int(self.lengths.sum())

    def read(self, begin: int, count: int) -> npt.NDArray[np.int64]:
        """Copy `count` tokens from token `begin` of the .bin on: [count] int64."""
        tokens = self._dataset.bin_reader.read(
            dtype=self._dtype.type, count=count, offset=begin * self._dtype.itemsize
        )
        return tokens.astype(np.int64)

    def check_sample(self, vocab_size: int) -> int:
        """Look for ids outside the vocabulary in up to 4 million tokens spread over the .bin.

        Returns:
            The largest id seen.
        """
        windows = max(1, min(_SAMPLE_WINDOWS, -(-self.num_tokens // _SAMPLE_TOKENS)))
        # evenly spread windows of 65,536 tokens, the last one ending with the file
        begins = np.linspace(0, max(self.num_tokens - _SAMPLE_TOKENS, 0), windows).astype(np.int64)
        count = min(_SAMPLE_TOKENS, self.num_tokens)
        largest = 0
        for begin in begins.tolist():
            tokens = self.read(begin, count)
            self.check_ids(tokens, vocab_size)
            largest = max(largest, int(tokens.max()))
        return largest

    def check_ids(self, tokens: npt.NDArray[np.int64], vocab_size: int) -> None:
        """Check that every token has a row in the embedding.

        Raises:
            ValueError: for a negative id, or one from vocab_size on.
        """
        if len(tokens) == 0:
            return
        smallest, largest = int(tokens.min()), int(tokens.max())
        if smallest < 0:
            raise corpus_error(
                self.corpus, f"{self.prefix}.bin holds the negative token id {smallest}; write the pair again"
            )
        if largest >= vocab_size:
            raise corpus_error(
                self.corpus,
                f"{self.prefix}.bin holds token id {largest}, but model.vocab_size={vocab_size}; "
                f"use model.vocab_size={largest + 1} or more",
            )


def write_store(prefix: str, documents: Iterable[npt.NDArray[np.int32]], *, vocab_size: int) -> None:
    """Write documents as a .bin/.idx pair that Megatron's own tools can read too; one is in memory at a time.

    Args:
        prefix: path without .bin and .idx.
        documents: [num_tokens] int32 each.
        vocab_size: decides the type of the ids, see the module.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        full, rest = divmod(len(document), _MAX_SEQUENCE_TOKENS)
        # a document that is too long for one length becomes several sequences
        lengths = [_MAX_SEQUENCE_TOKENS] * full + [rest] * (rest > 0)
        # It is declared for tensors, but hands what it gets to numpy.
        builder.add_document(document, lengths)  # pyright: ignore[reportArgumentType]
    builder.finalize(prefix + ".idx")


def _check_pair(prefix: str, corpus: str) -> None:
    # Megatron's reader has asserts for a few of these, and a crash in its clean-up for the others.
    try:
        with open(prefix + ".idx", "rb") as stream:
            header = stream.read(_INDEX_HEADER.size)
        sizes = [Path(prefix + suffix).stat().st_size for suffix in (".idx", ".bin")]
    except OSError as error:
        raise corpus_error(
            corpus, f"{error.filename} cannot be read ({error.strerror}); both files are needed"
        ) from error
    if len(header) < _INDEX_HEADER.size:
        raise corpus_error(corpus, f"{prefix}.idx is no index of Megatron; write the pair again")
    magic, version, code, num_sequences, num_edges = _INDEX_HEADER.unpack(header)
    if magic != _INDEX_MAGIC or version != 1:
        raise corpus_error(corpus, f"{prefix}.idx is no index of Megatron; write the pair again")
    if code not in _INTEGER_CODES:
        raise corpus_error(corpus, f"{prefix}.bin holds no integers (type code {code}); write the pair again")
    if num_sequences == 0 or sizes[1] == 0:
        raise corpus_error(corpus, f"{prefix}.bin is empty; give a corpus with at least one token")
    # int32 length and int64 pointer of each sequence, int64 of each edge
    told = _INDEX_HEADER.size + 12 * num_sequences + 8 * num_edges
    if num_edges < 2 or sizes[0] < told:
        raise corpus_error(corpus, f"{prefix}.idx is cut off; copy it again")
    if sizes[0] == told + num_sequences:
        raise corpus_error(
            corpus,
            f"{prefix}.idx has modes, for several kinds of sequences (multimodal); write the pair without",
        )
    if sizes[0] > told:
        raise corpus_error(
            corpus, f"{prefix}.idx has {sizes[0]} bytes, {told} by its own numbers; copy both files again"
        )

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
_CHUNK = 1 << 20
"sequences or documents that are checked at a time"
_SAMPLE_WINDOWS, _SAMPLE_TOKENS = 64, 1 << 16


class TokenStore:
    """Read the documents of a .bin/.idx pair, memory-mapped.

    Edges of documents are worked out when they are asked for, 16 bytes per document in memory; the pair
    itself is checked at once, 1M sequences at a time.

    Attributes:
        corpus: the setting that led here, for messages.
        prefix: path without .bin and .idx.

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
        self._check_document_indices()
        self.num_tokens = self._check_sequences()
        self._edges: npt.NDArray[np.int64] | None = None
        told, size = self.num_tokens * self._dtype.itemsize, os.path.getsize(prefix + ".bin")
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

    def _check_sequences(self) -> int:
        """Make sure that sequences lie one behind another; return the tokens of all."""
        index, end = self._dataset.index, 0
        for first in range(0, len(index.sequence_lengths), _CHUNK):
            lengths = np.asarray(index.sequence_lengths[first : first + _CHUNK], np.int64)
            ends = end + np.cumsum(lengths)
            pointers = index.sequence_pointers[first : first + _CHUNK]
            if not np.array_equal(pointers, (ends - lengths) * self._dtype.itemsize):
                raise corpus_error(
                    self.corpus, f"sequences of {self.prefix}.bin are not in order; write the pair again"
                )
            if np.any(lengths < 0):
                raise self._bad_documents()
            end = int(ends[-1])
        return end

    def _check_document_indices(self) -> None:
        indices = self._dataset.document_indices
        sound = len(indices) > 1 and indices[0] == 0 and indices[-1] == len(self._dataset)
        for first in range(0, len(indices) if sound else 0, _CHUNK):
            # one more, so that the step between two parts is looked at too
            sound = sound and not np.any(np.diff(indices[first : first + _CHUNK + 1]) < 0)
        if not sound:
            raise self._bad_documents()

    def _document_edges(self) -> npt.NDArray[np.int64]:
        """Work out where documents begin and end: [num_documents + 1]."""
        if self._edges is None:
            # Copies: Megatron's arrays point into a map that is closed with the data set.
            ends = np.zeros(len(self._dataset.index.sequence_lengths) + 1, np.int64)
            np.cumsum(self._dataset.index.sequence_lengths, out=ends[1:])
            # a document is one or more sequences: its edges are the token positions of its first sequences
            self._edges = ends[self._dataset.document_indices]
        return self._edges

    def documents_at(
        self, places: npt.NDArray[np.integer]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Find the documents that tokens belong to, by a binary search in the mapped .idx.

        Args:
            places: [n] tokens, counted from the start of the .bin.

        Returns:
            Number and length in tokens of each one's document, [n] int64 each. Example: documents of 3 and 2
            tokens, places [1, 3] -> [0, 1] and [3, 2].
        """
        index, first = self._dataset.index, self._dataset.document_indices
        size = self._dtype.itemsize
        # the last one that begins there: empty sequences and documents before it hold no token
        sequence = np.searchsorted(index.sequence_pointers, places * size, side="right") - 1
        document = np.searchsorted(first, sequence, side="right") - 1
        last = np.asarray(first[document + 1]) - 1
        end = index.sequence_pointers[last] // size + index.sequence_lengths[last]
        return document, end - index.sequence_pointers[first[document]] // size

    def forget_documents(self) -> None:
        """Free the edges of documents; they are worked out again where they are asked for."""
        self._edges = None

    @property
    def begin(self) -> npt.NDArray[np.int64]:
        """Return the first token of each document in the .bin: [num_documents] int64."""
        return self._document_edges()[:-1]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each document: [num_documents] int64."""
        return np.diff(self._document_edges())

    def _bad_documents(self) -> ValueError:
        problem = f"documents of {self.prefix}.idx do not cover its sequences; write the pair again"
        return corpus_error(self.corpus, problem)

    @property
    def num_documents(self) -> int:
        """Count the documents, empty ones included."""
        return len(self._dataset.document_indices) - 1

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

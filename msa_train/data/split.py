"""Choose the documents that are held out for validation."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from msa_train.data.errors import corpus_error
from msa_train.data.token_cache.store import TokenStore

_MIN_TAIL_TOKENS = 2
"the fewest tokens of which one has a label"
_CHUNK_DOCUMENTS = 1 << 20
"that are looked at as Python's numbers at a time"


@dataclass(slots=True)
class TokenReader:
    """Read tokens of a store, and make sure that the model knows them."""

    store: TokenStore
    "where the tokens are"
    vocab_size: int
    "ids from here on are an error"

    def read(self, begin: int, count: int) -> npt.NDArray[np.int64]:
        """Read `count` tokens from token `begin` of the .bin on, int64.

        Raises:
            ValueError: if an id has no row in the embedding.
        """
        tokens = self.store.read(begin, count)
        self.store.check_ids(tokens, self.vocab_size)
        return tokens


@dataclass(slots=True)
class DocumentView:
    """Read some of a store's documents, or parts of them."""

    store: TokenStore
    "where the tokens are"
    begin: npt.NDArray[np.int64]
    "[num_documents] int64, first token of each, counted from the start of the .bin"
    lengths: npt.NDArray[np.int64]
    "[num_documents] int64, tokens of each"
    vocab_size: int
    "ids from here on are an error"

    def read(self, doc: int, start: int, count: int) -> npt.NDArray[np.int64]:
        """Read up to `count` tokens of document `doc` from its token `start` on, int64; fewer where it ends.

        Example: document [1, 2, 3], start 1, count 5 -> [2, 3].

        Raises:
            ValueError: if an id has no row in the embedding.
        """
        # never beyond the view's part of the document: a tail belongs to validation alone
        count = min(count, int(self.lengths[doc]) - start)
        return self.reader.read(int(self.begin[doc]) + start, count)

    @property
    def reader(self) -> TokenReader:
        """Return what reads the tokens."""
        return TokenReader(self.store, self.vocab_size)


def hash_name(name: str) -> int:
    """Hash a document's name to 64 bits (BLAKE2b); "a" -> 3405396810240292928."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")


def hash_indices(count: int) -> npt.NDArray[np.uint64]:
    """Hash each index from 0 on to 64 bits, for documents without a name: [count] uint64.

    The finaliser of splitmix64 (Steele, Lea and Flood 2014). Example: index 0 -> 0xe220a8397b1dcdaf.
    """
    hashes = np.empty(count, np.uint64)
    # in parts, so that what lies between takes no memory
    for begin in range(0, count, _CHUNK_DOCUMENTS):
        end = min(begin + _CHUNK_DOCUMENTS, count)
        mixed = np.arange(begin + 1, end + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashes[begin:end] = mixed ^ (mixed >> np.uint64(31))
    return hashes


def choose_held_out(
    hashes: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64], fraction: float
) -> npt.NDArray[np.bool_]:
    """Choose the documents to hold out: those whose hash lies in the lowest `fraction` of all hashes.

    So a document's side depends on its own name alone. A corpus of few documents, or of very unequal ones,
    can thereby lose less than half or more than twice `fraction` of its tokens; then documents are taken in
    the order of their hashes as long as they fit into that share of the tokens, and at least the shortest
    one. At least one document stays on either side.

    Args:
        hashes: [num_documents] hash of each name.
        lengths: [num_documents] tokens, none of them 0.
        fraction: share to hold out, from 0 to below 1.

    Returns:
        [num_documents] bool.

    Example: hashes 0.1, 0.9, 0.6, 0.3 of their range, fraction 0.25: lengths [10, 10, 10, 10] -> document 0,
    which has 0.25 of the tokens; lengths [100, 1, 10, 5] -> documents 3, 2 and 1, as document 0 has 0.86 of
    them.
    """
    if fraction == 0 or len(hashes) < 2:
        return np.zeros(len(hashes), np.bool_)
    # hashes are even over 0 to 2^64: the lowest `fraction` of that range
    held_out = hashes < np.uint64(int(fraction * 2**64))
    # documents are drawn, tokens are wanted: with few or unequal documents the two shares differ
    share = float(lengths[held_out].sum() / lengths.sum())
    if fraction / 2 <= share <= fraction * 2 and not held_out.all():
        return held_out
    return _fill_share(np.argsort(hashes, kind="stable"), lengths, fraction)


def _fill_share(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], fraction: float
) -> npt.NDArray[np.bool_]:
    """Hold out documents in this order as long as they fit, at least the shortest one.

    Example: order [0, 3, 2, 1], lengths [50, 20, 20, 10], fraction 0.35: room for 35 tokens takes documents 3
    and 2.
    """
    held_out = np.zeros(len(lengths), np.bool_)
    room, shortest = int(lengths.sum() * fraction), int(lengths.min())
    for begin in range(0, len(order), _CHUNK_DOCUMENTS):
        # nothing fits any more; before that, only what may fit is looked at
        if room < shortest:
            break
        part = order[begin : begin + _CHUNK_DOCUMENTS]
        part = part[lengths[part] <= room]
        for doc, length in zip(part.tolist(), lengths[part].tolist(), strict=True):
            if length <= room:
                held_out[doc] = True
                room -= length
    # every document is longer than the share: the shortest one costs training least
    if not held_out.any():
        held_out[lengths.argmin()] = True
    return held_out


def split_store(
    store: TokenStore, hashes: npt.NDArray[np.uint64], *, fraction: float, vocab_size: int
) -> tuple[DocumentView, DocumentView | None]:
    """Split into views of the training documents and of the held-out ones, None if nothing is held out.

    Empty documents are left out of both. A single document gives its tail to validation.
    """
    train, held_out = _sides(store.begin, store.lengths, hashes, fraction)
    views = [DocumentView(store, *side, vocab_size) for side in (train, held_out)]
    return views[0], views[1] if len(views[1].lengths) else None


def check_labels(
    corpus: str, hashes: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64], *, fraction: float
) -> int:
    """Make sure that there is something to predict: a document of n tokens has n - 1 labels.

    Args:
        corpus: the setting, for messages.
        hashes: [num_documents] hash of each name.
        lengths: [num_documents] tokens.
        fraction: share to hold out.

    Returns:
        Number of held-out documents.

    Raises:
        ValueError: if there is no label on one of the sides, whose loss would be 0 all the time.
    """
    # only lengths matter here, so no document needs its place
    (_, train), (_, held_out) = _sides(lengths, lengths, hashes, fraction)
    if not np.any(train > 1):
        raise corpus_error(
            corpus,
            f"none of the {len(train)} documents to train on has two tokens, so there is nothing to predict; "
            "join them to longer ones",
        )
    if len(held_out) and not np.any(held_out > 1):
        raise corpus_error(
            corpus,
            f"none of the {len(held_out)} held-out documents has two tokens, so there is nothing to predict; "
            "use another data.validation_fraction, or 0 with train.validate_every=0",
        )
    return len(held_out)


_Side = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"begin and length of each document"


def _sides(
    begin: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    fraction: float,
) -> tuple[_Side, _Side]:
    """Return training and held-out documents, without the empty ones."""
    # before the split, so that an empty document cannot be all that is held out
    kept = lengths > 0
    if not kept.all():
        begin, lengths, hashes = begin[kept], lengths[kept], hashes[kept]
    if fraction > 0 and len(lengths) == 1:
        return _split_tail(begin, lengths, fraction)
    held_out = choose_held_out(hashes, lengths, fraction)
    return (begin[~held_out], lengths[~held_out]), (begin[held_out], lengths[held_out])


def _split_tail(
    begin: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], fraction: float
) -> tuple[_Side, _Side]:
    """Give the tail of the only document to validation; example: 100 tokens, fraction 0.05 -> 95 and 5."""
    length = int(lengths[0])
    tail = max(round(length * fraction), _MIN_TAIL_TOKENS)
    # both sides need two tokens to have a label
    if length - tail < _MIN_TAIL_TOKENS:
        return (begin, lengths), (begin[:0], lengths[:0])
    return (begin, lengths - tail), (begin + (length - tail), np.array([tail], np.int64))

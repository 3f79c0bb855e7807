"""Which documents are held out for validation."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from msa_train.data.errors import corpus_error
from msa_train.data.token_cache.store import TokenStore

_MIN_TAIL_TOKENS = 2
"the fewest tokens of which one has a label"


@dataclass(slots=True)
class DocumentView:
    """Some of a store's documents, or parts of them.

    Attributes:
        store: where the tokens are.
        begin: [num_documents] int64, first token of each, counted from the start of the .bin.
        lengths: [num_documents] int64.
        vocab_size: ids from here on are an error.
    """

    store: TokenStore
    begin: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    vocab_size: int

    def read(self, doc: int, start: int, count: int) -> npt.NDArray[np.int64]:
        """Up to `count` tokens of document `doc` from its token `start` on; fewer where it ends."""
        count = min(count, int(self.lengths[doc]) - start)
        tokens = self.store.read(int(self.begin[doc]) + start, count)
        self.store.check_ids(tokens, self.vocab_size)
        return tokens


def hash_name(name: str) -> int:
    """64 bits of a document's name."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")


def hash_indices(count: int) -> npt.NDArray[np.uint64]:
    """64 bits of each index from 0 on (the finaliser of splitmix64), for documents without a name."""
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def choose_held_out(
    hashes: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64], fraction: float
) -> npt.NDArray[np.bool_]:
    """Documents to hold out: those whose hash lies in the lowest `fraction` of all hashes.

    So a document's side depends on its own name alone. A corpus of few documents, or of very unequal ones,
    can thereby lose less than half or more than twice `fraction` of its tokens; then documents are taken in
    the order of their hashes as long as they fit into that share of the tokens, and at least the shortest
    one. At least one document stays on either side.

    Args:
        hashes: [num_documents] hash of each name.
        lengths: [num_documents] tokens, none of them 0.
        fraction: share to hold out, from 0 to below 1.
    """
    if fraction == 0 or len(hashes) < 2:
        return np.zeros(len(hashes), np.bool_)
    held_out = hashes < np.uint64(int(fraction * 2**64))
    share = float(lengths[held_out].sum() / lengths.sum())
    if fraction / 2 <= share <= fraction * 2 and not held_out.all():
        return held_out
    return _fill_share(np.argsort(hashes, kind="stable"), lengths, fraction)


def _fill_share(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], fraction: float
) -> npt.NDArray[np.bool_]:
    held_out = np.zeros(len(lengths), np.bool_)
    room = int(lengths.sum() * fraction)
    for doc, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length <= room:
            held_out[doc] = True
            room -= length
    if not held_out.any():
        held_out[lengths.argmin()] = True
    return held_out


def split_store(
    store: TokenStore, hashes: npt.NDArray[np.uint64], *, fraction: float, vocab_size: int
) -> tuple[DocumentView, DocumentView | None]:
    """Views of the training documents and of the held-out ones, None if there is nothing to hold out.

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
    (_, train), (_, held_out) = _sides(np.zeros_like(lengths), lengths, hashes, fraction)
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
    """Training and held-out documents, without the empty ones."""
    kept = lengths > 0
    begin, lengths, hashes = begin[kept], lengths[kept], hashes[kept]
    if fraction > 0 and len(lengths) == 1:
        return _split_tail(begin, lengths, fraction)
    held_out = choose_held_out(hashes, lengths, fraction)
    return (begin[~held_out], lengths[~held_out]), (begin[held_out], lengths[held_out])


def _split_tail(
    begin: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], fraction: float
) -> tuple[_Side, _Side]:
    length = int(lengths[0])
    tail = max(round(length * fraction), _MIN_TAIL_TOKENS)
    if length - tail < _MIN_TAIL_TOKENS:
        return (begin, lengths), (begin[:0], lengths[:0])
    return (begin, lengths - tail), (begin + (length - tail), np.array([tail], np.int64))

"""Hold what is left of documents: stretches of tokens that no pack has used yet.

Example: a document of 10 tokens was cut into pieces of 4, 4 and 2, and the second one was used: the
fragments [0, 4) and [8, 10) are left. Had the first one been used, one fragment [4, 10) would be left.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from msa_train.data.orders import order_of


@dataclass(slots=True, frozen=True)
class Fragments:
    """Hold parallel arrays, one entry per fragment; whole documents are fragments too."""

    begin: npt.NDArray[np.int64]
    "[n] first token in the .bin; ascending, where fragments come from `join`"
    length: npt.NDArray[np.int64]
    "[n] tokens, at least 1"
    goes_on: npt.NDArray[np.uint8]
    "[n] 1: the document goes on behind the fragment, so its last token has a label"

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def num_tokens(self) -> int:
        """Count the tokens."""
        return int(self.length.sum())

    def checksum(self) -> list[int]:
        """Return what tells these fragments from others; plain JSON."""
        parts = (self.begin, self.length, self.goes_on)
        crc = [zlib.crc32(np.ascontiguousarray(part).data) for part in parts]
        return [len(self), self.num_tokens, *crc]

    def take(self, index: npt.NDArray[np.bool_]) -> "Fragments":
        """Return those that are marked."""
        return Fragments(self.begin[index], self.length[index], self.goes_on[index])


def whole_documents(begin: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> Fragments:
    """Return documents as fragments; empty ones have none.

    Args:
        begin: [n] first token of each document in the .bin.
        lengths: [n] tokens of each.
    """
    kept = lengths > 0
    begin, lengths = begin[kept].astype(np.int64), lengths[kept].astype(np.int64)
    return Fragments(begin, lengths, np.zeros(len(begin), np.uint8))


def join(*parts: Fragments) -> Fragments:
    """Put fragments together, neighbours of one document into one; in the order of the .bin.

    Example: [0, 4) that goes on, and [4, 10) -> [0, 10).
    """
    begin = np.concatenate([part.begin for part in parts])
    order = order_of(begin.astype(np.uint64))
    begin = begin[order]
    length = np.concatenate([part.length for part in parts])[order]
    goes_on = np.concatenate([part.goes_on for part in parts])[order]
    if not len(begin):
        return Fragments(begin, length, goes_on)
    follows = (goes_on[:-1] == 1) & (begin[:-1] + length[:-1] == begin[1:])
    firsts = np.flatnonzero(np.concatenate(([True], ~follows)))
    lasts = np.append(firsts[1:], len(begin)) - 1
    return Fragments(begin[firsts], np.add.reduceat(length, firsts), goes_on[lasts])


def split_short(
    fragments: Fragments, *, share: float, seq_len: int, seed: int
) -> tuple[Fragments, Fragments]:
    """Split off what shorter packs shall hold: a share of the tokens, of documents that fit into them.

    Documents of up to seq_len tokens are taken by chance, then longer ones, the shortest first: steps of
    short packs so leave the long documents whole.

    Args:
        fragments: to be split.
        share: of the tokens, 0 to 1; what is taken ends with the document that reaches it.
        seq_len: of the shorter packs.
        seed: decides which are taken.

    Returns:
        The rest, and what was split off; of two fragments or more, neither is empty.

    Example: lengths [2, 9, 3, 4], share 0.25, seq_len 4: 4.5 of 18 tokens are wanted; documents of 3 and 4
    are taken where chance has them first, and the one of 9 stays whole.
    """
    wanted = share * fragments.num_tokens
    # by their places in the .bin: what is left of a document has no name
    mixed = (fragments.begin.astype(np.uint64) + np.uint64(seed % 2**32)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    fits = fragments.length <= seq_len
    keys = np.where(fits, 0, fragments.length).astype(np.int64)
    order = np.lexsort((mixed, keys))
    before = np.cumsum(fragments.length[order]) - fragments.length[order]
    taken = np.zeros(len(fragments), np.bool_)
    taken[order[before < wanted]] = True
    if len(order) > 1:
        # neither side of a few long documents is to be empty
        taken[order[-1]] = False
    return fragments.take(~taken), fragments.take(taken)

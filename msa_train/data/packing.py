"""Pack documents: choose the pieces that share a sequence, and where each of them starts.

A document longer than `seq_len` is cut into pieces of `seq_len` tokens and a rest. Pieces are laid into packs
of `seq_len` tokens, each on a multiple of `block_size`, so that a key block never holds two documents.
Example with seq_len=8, block_size=4 and documents of 3, 10 and 4 tokens (a, b, c; `.` is padding):

    pieces  a[0:3]  b[0:8]  b[8:10]  c[0:4]        in blocks  1  2  1  1
    packs   bbbbbbbb  aaa.cccc  bb......

Cost: best fit looks once at each piece that does not fill a pack, see `best_fit`; an epoch sorts all pieces
once more. Of large corpora both are kept on disk, see `pack_index`. Padding is less than a block per piece,
and what is left free in packs.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from msa_train.data.orders import order_of, shuffled
from msa_train.data.origin import PackOrigin

IGNORE_LABEL = -100
_CHUNK_PIECES = 1 << 20

# streams of random numbers: the order of the search, what fills the slots, the order of the packs
_PACKING_STREAM, _PIECE_STREAM, _PACK_STREAM = range(3)


@dataclass(slots=True)
class Pack:
    """Hold one sequence of `seq_len` tokens."""

    tokens: npt.NDArray[np.int64]
    "[seq_len] int64, padding is 0"
    labels: npt.NDArray[np.int64]
    "[seq_len] int64, the next token of the document, `IGNORE_LABEL` where there is none"
    cu_seqlens: npt.NDArray[np.int32]
    "[num_docs + 1] int32, block-aligned starts; the first is 0, the last is seq_len"
    doc_lengths: npt.NDArray[np.int32]
    "[num_docs] int32, real tokens of each document; the rest of its slot is padding"
    origin: PackOrigin | None = None
    "where its documents come from; None where nobody tells"

    @property
    def num_tokens(self) -> int:
        """Count the tokens that are not padding."""
        return int(self.doc_lengths.sum())

    @property
    def num_labels(self) -> int:
        """Count the positions that count in the loss."""
        return int(np.count_nonzero(self.labels != IGNORE_LABEL))

    @property
    def padding_share(self) -> float:
        """Return the share of the positions that is padding, 0 to 1."""
        return 1.0 - self.num_tokens / len(self.tokens)


class Packs(Protocol):
    """Number packs without end, from 0 on; the same ones on all ranks."""

    @property
    def num_packs(self) -> int:
        """Return the packs of one epoch."""
        ...

    def __getitem__(self, index: int) -> Pack:
        """Build pack number `index`."""
        ...


@dataclass(slots=True)
class Pieces:
    """Hold parallel arrays, one entry per piece: `length` tokens of document `doc` from token `start` on.

    Numbers are int32 where all of them are below 2^31, else int64.
    """

    doc: npt.NDArray[np.integer]
    "[num_pieces] number of the document"
    start: npt.NDArray[np.integer]
    "[num_pieces] first token in its document"
    length: npt.NDArray[np.integer]
    "[num_pieces] tokens, 1 to seq_len"

    def __len__(self) -> int:
        return len(self.doc)

    def take(self, index: npt.NDArray[np.integer] | slice) -> "Pieces":
        """Return the pieces at `index`."""
        return Pieces(self.doc[index], self.start[index], self.length[index])


@dataclass(slots=True)
class EpochPlan:
    """Fill the packs of one epoch.

    Pack k is `packing`'s pack `pack_order[k]`, and its slot s holds piece `slot_piece[s]`. Example:
    pack_slots [0, 2, 3, 4], slot_piece [1, 2, 0, 3], pack_order [0, 1, 2]: pack 0 holds pieces 1 and 2, pack
    1 piece 0, pack 2 piece 3.
    """

    packing: "Packing"
    "shapes of the packs"
    slot_piece: npt.NDArray[np.int64]
    "[num_slots] int64, piece in each slot"
    pack_order: npt.NDArray[np.int64]
    "[num_packs] int64, number of the shape of each pack"

    @property
    def num_packs(self) -> int:
        """Count the packs of the epoch."""
        return len(self.pack_order)

    def pieces(self, pack: int) -> Pieces:
        """Return the pieces of one pack, in the order in which they stand there."""
        shape = self.pack_order[pack]
        first, last = self.packing.pack_slots[shape], self.packing.pack_slots[shape + 1]
        return self.packing.pieces.take(self.slot_piece[first:last])


@dataclass(slots=True)
class Packing:
    """Hold the shapes of the packs, the same in every epoch; epochs differ in their content and order.

    All epochs therefore have the same number of packs, so that any step finds its epoch by a division.
    Documents of one pack do not see each other, so which ones meet matters no more than which packs share a
    step.
    """

    pieces: Pieces
    "every piece of every document; piece i fills slot i before shuffling"
    slot_blocks: npt.NDArray[np.integer]
    "[num_slots] size of each slot in blocks"
    pack_slots: npt.NDArray[np.int64]
    "[num_packs + 1] int64, pack p has the slots from pack_slots[p] to pack_slots[p + 1]"
    seed: int
    "seeds every shuffle, together with the epoch"

    @property
    def num_packs(self) -> int:
        """Count the packs of one epoch."""
        return len(self.pack_slots) - 1

    def epoch(self, epoch: int) -> EpochPlan:
        """Deal pieces of equal size in blocks among the slots of that size, and shuffle the packs.

        Example: slot_blocks = [2, 1, 1] and shuffled pieces 2, 0, 1 (sizes 1, 2, 1): sorted by size the
        pieces are 2, 1, 0 and the slots 1, 2, 0, so slot 1 gets piece 2, slot 2 gets piece 1 and slot 0 keeps
        piece 0.
        """
        slot_piece, pack_order = deal_pieces(self.slot_blocks, self.num_packs, self.seed, epoch)
        return EpochPlan(self, slot_piece, pack_order)


def deal_pieces(
    slot_blocks: npt.NDArray[np.integer], num_packs: int, seed: int, epoch: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the piece in each slot [num_slots], the shape of each pack [num_packs]; see `Packing.epoch`."""
    by_chance = shuffled(len(slot_blocks), seed, _PIECE_STREAM, epoch)
    # both sides sorted by size, stably: pieces stay in shuffled order within a size, slots in their own
    by_size = by_chance[order_of(slot_blocks[by_chance].astype(np.uint32))]
    slot_piece = np.empty_like(by_size)
    slot_piece[order_of(slot_blocks.astype(np.uint32))] = by_size
    return slot_piece, shuffled(num_packs, seed, _PACK_STREAM, epoch)


def pack_documents(
    doc_lengths: npt.NDArray[np.int64], *, seq_len: int, block_size: int, seed: int
) -> Packing:
    """Cut documents into pieces and find packs for them.

    Args:
        doc_lengths: [num_docs] tokens of each document; documents of 0 tokens have no piece.
        seq_len: tokens of a pack.
        block_size: alignment of the pieces; must divide seq_len.
        seed: order in which pieces look for a pack.

    Example: lengths [3, 10, 4], seq_len 8, block_size 4, seed 0: pieces of documents [2, 1, 0, 1] with
    lengths [4, 2, 3, 8], slot_blocks [1, 1, 1, 2], pack_slots [0, 2, 3, 4]: 3 packs with 2, 1 and 1 slots.

    Raises:
        ValueError: if seq_len, block_size and seed do not go together.
    """
    if block_size < 1 or seq_len < 1 or seq_len % block_size:
        raise ValueError(
            f"data.seq_len={seq_len}: must be a positive multiple of attention.block_size={block_size}; "
            f"use data.seq_len={max(seq_len // max(block_size, 1), 1) * max(block_size, 1)}"
        )
    if seed < 0:
        raise ValueError(f"data.seed={seed}: must not be negative; use data.seed={-seed}")
    pieces = split_documents(doc_lengths, seq_len)
    # documents of a corpus are often sorted by kind and length; shuffled, small pieces are left to fill packs
    pieces = pieces.take(shuffled(len(pieces), seed, _PACKING_STREAM, 0))
    blocks = -(-pieces.length // block_size)
    pack = _choose_packs(blocks, seq_len // block_size)
    # slots of a pack become neighbours; pack_slots then counts them up
    by_pack = order_of(pack.view(np.uint64))
    pack_slots = np.zeros(int(pack.max(initial=-1)) + 2, np.int64)
    np.cumsum(np.bincount(pack), out=pack_slots[1:])
    return Packing(pieces.take(by_pack), blocks[by_pack], pack_slots, seed)


def split_documents(doc_lengths: npt.NDArray[np.int64], seq_len: int) -> Pieces:
    """Cut documents longer than `seq_len`.

    Example: lengths [3, 10] and seq_len 8 give doc [0, 1, 1], start [0, 0, 8], length [3, 8, 2].
    """
    largest = max(int(doc_lengths.max(initial=0)), len(doc_lengths))
    dtype = np.int32 if largest < 1 << 31 else np.int64
    lengths = doc_lengths.astype(dtype)
    if len(lengths) and lengths.min() > 0 and lengths.max() <= seq_len:
        return Pieces(np.arange(len(lengths), dtype=dtype), np.zeros_like(lengths), lengths)
    num_pieces = -(-lengths // seq_len)
    # one entry per piece: 0 pieces for an empty document, which so vanishes
    doc = np.repeat(np.arange(len(lengths), dtype=dtype), num_pieces)
    first_piece = np.cumsum(num_pieces) - num_pieces
    # a piece's number within its document, times seq_len
    start = ((np.arange(len(doc)) - first_piece[doc]) * seq_len).astype(dtype)
    return Pieces(doc, start, np.minimum(lengths[doc] - start, seq_len))


def _choose_packs(blocks: npt.NDArray[np.integer], capacity: int) -> npt.NDArray[np.int64]:
    # Pieces that fill a pack are most of a corpus of long documents, and need no search.
    is_full = blocks == capacity
    pack = np.empty(len(blocks), np.int64)
    pack[~is_full] = best_fit(blocks[~is_full], capacity)
    first_full = int(pack[~is_full].max(initial=-1)) + 1
    pack[is_full] = first_full + np.arange(np.count_nonzero(is_full))
    return pack


def best_fit(sizes: npt.NDArray[np.integer], capacity: int) -> npt.NDArray[np.int64]:
    """Choose a pack for each piece: the fullest one that still has room, else a new one.

    Of packs that are equally full the last one to become so is taken. Best fit in the order given needs about
    1.7 times the fewest packs in the worst case (Johnson et al. 1974).

    A piece goes to the pack of the one before as long as no other pack is fuller and has room; that needs two
    comparisons. Else the free sizes, kept in order, are searched. 0.09 us per piece of 17 blocks in packs of
    1,536; 0.4 to 0.7 in packs of 64, of which a few pieces fill each.

    Args:
        sizes: [num_pieces] integers, blocks of each piece, 1 to capacity.
        capacity: blocks of a pack.

    Returns:
        [num_pieces] int64, number of the pack. Example: sizes [2, 3, 2, 1], capacity 4 -> [0, 1, 0, 1].
    """
    chosen = np.empty(len(sizes), np.int64)
    fitter = _BestFit(capacity)
    for begin in range(0, len(sizes), _CHUNK_PIECES):
        # Python's own numbers are quick to compare, but take 40 bytes each
        part = sizes[begin : begin + _CHUNK_PIECES]
        chosen[begin : begin + len(part)] = fitter.place(part.tolist())
    return chosen


class _BestFit:
    """Hold the packs that have room, between parts of a long list of pieces."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_packs = 0
        self.free_sizes: list[int] = []
        "ascending, each once, of packs other than the open one"
        self.packs_with: dict[int, list[int]] = {}
        "packs by their free size, the last to get it at the end"
        self.open = (-1, 0)
        "pack of the piece before, and its free size"

    def place(self, sizes: list[int]) -> npt.NDArray[np.int64]:
        """Return the pack of each piece: [len(sizes)] int64."""
        free_sizes, packs_with = self.free_sizes, self.packs_with
        pack, free = self.open
        below = self._below(free)
        # neighbours that share a pack, by the first of them
        firsts, packs = [0], [pack]
        for number, size in enumerate(sizes):
            if below < size <= free:
                free -= size
                continue
            if free:
                if free not in packs_with:
                    packs_with[free] = []
                    insort(free_sizes, free)
                packs_with[free].append(pack)
            place = bisect_left(free_sizes, size)
            if place == len(free_sizes):
                pack, free = self.num_packs, self.capacity
                self.num_packs += 1
            else:
                free = free_sizes[place]
                pack = packs_with[free].pop()
                if not packs_with[free]:
                    del packs_with[free], free_sizes[place]
            free -= size
            below = self._below(free)
            firsts.append(number)
            packs.append(pack)
        self.open = (pack, free)
        return np.repeat(np.array(packs, np.int64), np.diff(firsts, append=len(sizes)))

    def _below(self, free: int) -> int:
        """Return the largest free size of other packs below `free`, 0 if there is none."""
        place = bisect_left(self.free_sizes, free)
        return self.free_sizes[place - 1] if place else 0

"""Go on with packs of another length where packs of the last length have stopped, document by document.

Packs of two lengths cut and order documents differently, so no pack number of one says what the other has
used. Hence a change of length packs anew what is left of the epoch, and nothing else; whole epochs of all
documents follow. Every token is so used once per epoch, whatever the lengths were.

Example: documents a to d. Packs of 8 tokens have used a and the first 8 tokens of c. `Rest` holds b, d and
the end of c; packs of 16 tokens hold these first, and then a to d again, in their own order.

Cost: every rank finds what is left of n pieces once per start and change of length. Packing it costs what
packing documents costs; where packings of all documents are on disk (`pack_index`), this one is too, made
once and mapped. Measured with 1M documents, a third of their packs of 8,192 tokens used: 0.12 s of a core to
find what is left, 0.13 s to pack it for 65,536. By arithmetic, for 100M documents: 6 GB while it is found,
1.7 GB kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from msa_train.data.carried.fragments import Fragments, join
from msa_train.data.dataset import PackedDataset
from msa_train.data.pack_index import PackTable, mapped_table, table_of
from msa_train.data.packing import Pack, pack_documents
from msa_train.data.split import DocumentView
from msa_train.runtime.checksums import digest


@dataclass(slots=True, frozen=True)
class Rest:
    """Hold what is left of some documents: parts of epochs that have begun, then all epochs from one on."""

    rounds: tuple[Fragments, ...] = ()
    "what is left of each epoch that has begun, none of them empty; mostly one, or none at a boundary"
    epoch: int = 0
    "epochs that have begun; the next whole one has this number"

    def num_tokens(self) -> int:
        """Count the tokens before the next whole epoch."""
        return sum(part.num_tokens for part in self.rounds)


@dataclass(slots=True)
class _Part:
    packs: PackedDataset
    first: int
    "number of its first pack in `packs`"
    count: int
    "packs; the last part has no end"


class CarriedPacks:
    """Build packs of one length from what packs of other lengths have left.

    Args:
        whole: packs of this length of all documents, for the epochs after the rest.
        rest: what is left of the same documents.
        seq_len: tokens of a pack.
        block_size: alignment of documents in a pack.
        seed: order of documents and packs.
    """

    def __init__(self, whole: PackedDataset, rest: Rest, *, seq_len: int, block_size: int, seed: int) -> None:
        self._whole, self._rest = whole, rest
        self._parts: list[_Part] = []
        for number, fragments in enumerate(rest.rounds):
            # the order differs from one epoch to the next, as it does in whole epochs
            epoch = rest.epoch - len(rest.rounds) + number
            packs = packs_of(whole, fragments, seq_len=seq_len, block_size=block_size, seed=seed)
            self._parts.append(_Part(packs, max(epoch, 0) * packs.num_packs, packs.num_packs))

    def __getitem__(self, index: int) -> Pack:
        """Build pack number `index`; the first one is the first of what is left.

        Raises:
            IndexError: for a negative number.
            ValueError: if a token id has no row in the embedding.
        """
        if index < 0:
            raise IndexError(f"pack {index}: packs are counted from 0 and have no end")
        for part in self._parts:
            if index < part.count:
                return part.packs[part.first + index]
            index -= part.count
        return self._whole[self._rest.epoch * self._whole.num_packs + index]

    @property
    def num_packs(self) -> int:
        """Return the packs of one whole epoch."""
        return self._whole.num_packs

    @property
    def num_left(self) -> int:
        """Return the packs before the first whole epoch."""
        return sum(part.count for part in self._parts)

    def rest(self, used: int) -> Rest:
        """Return what is left after the first `used` packs."""
        rounds: list[Fragments] = []
        left = used
        for part, fragments in zip(self._parts, self._rest.rounds, strict=True):
            taken = min(left, part.count)
            left -= taken
            if taken == 0:
                rounds.append(fragments)
            elif taken < part.count:
                epoch = part.first // part.count
                rounds.append(part.packs.left_in_epoch(epoch, taken))
        begun, place = divmod(left, self._whole.num_packs)
        epoch = self._rest.epoch + begun
        if place:
            rounds.append(self._whole.left_in_epoch(epoch, place))
            epoch += 1
        return Rest(tuple(rounds), epoch)


def packs_of(
    whole: PackedDataset, fragments: Fragments, *, seq_len: int, block_size: int, seed: int
) -> PackedDataset:
    """Pack fragments of the documents of `whole`, at least one; on disk where the packing of `whole` is."""

    def make() -> PackTable:
        packing = pack_documents(fragments.length, seq_len=seq_len, block_size=block_size, seed=seed)
        return table_of(
            packing, fragments.begin, fragments.length, block_size=block_size, goes_on=fragments.goes_on
        )

    table = None
    if whole.folder is not None:
        facts = [fragments.checksum(), seq_len, block_size, seed]
        folder = whole.folder.with_name(f"rest_{digest(facts)}")
        table = mapped_table(folder, make, block_size=block_size, seed=seed)
    table = table or make()

    def view() -> DocumentView:
        reader = whole.reader
        return DocumentView(reader.store, fragments.begin, fragments.length, reader.vocab_size)

    sizes = {"seq_len": seq_len, "block_size": block_size, "seed": seed}
    return PackedDataset(view, table=table, reader=whole.reader, origin=whole.origin, **sizes)


def unite(rests: Sequence[Rest], documents: Sequence[Fragments]) -> Rest:
    """Put together what is left of sets of documents that were read by packs of their own.

    Where one of them is epochs ahead, the others' whole epochs are part of the rest.

    Args:
        rests: of each set.
        documents: all documents of each set.
    """
    last = max(rest.epoch for rest in rests)
    # rounds by the epoch that they belong to: the last one of a rest is of the epoch before its next
    by_epoch: dict[int, list[Fragments]] = {}
    for rest, every in zip(rests, documents, strict=True):
        for back, part in enumerate(reversed(rest.rounds), start=1):
            by_epoch.setdefault(rest.epoch - back, []).append(part)
        for epoch in range(rest.epoch, last):
            by_epoch.setdefault(epoch, []).append(every)
    rounds = (join(*by_epoch[epoch]) for epoch in sorted(by_epoch))
    return Rest(tuple(part for part in rounds if len(part)), last)

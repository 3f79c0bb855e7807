"""Load what was prepared: split the documents of a corpus, and pack them or map a packing that is kept."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from msa_train.config import DataConfig
from msa_train.data import pack_index
from msa_train.data.dataset import PackedDataset, pack_view
from msa_train.data.errors import corpus_error
from msa_train.data.origin import PackOrigin, bucket_of
from msa_train.data.pack_index import PackTable
from msa_train.data.prepare import Corpus, prepare_corpus
from msa_train.data.split import DocumentView, TokenReader, hash_indices, split_store
from msa_train.data.token_cache.cache import cache_root, read_documents, read_makings
from msa_train.data.token_cache.store import TokenStore

Views = Sequence[DocumentView | None]


def load_datasets(
    data: DataConfig, *, block_size: int, vocab_size: int, prepared: Corpus | None = None
) -> tuple[PackedDataset, PackedDataset | None, Corpus]:
    """Load training packs, validation packs (None if nothing is held out) and the corpus.

    Args:
        data: the settings, without a mixture.
        block_size: alignment of documents in a pack.
        vocab_size: rows of the embedding.
        prepared: what `prepare_corpus` returned for these settings: every worker is given it, so that all
            train on what was announced, and nobody looks for files or compares checksums again.

    Raises:
        ValueError: one line naming the setting, what is wrong and the fix.
    """
    corpus = prepared or prepare_corpus(data, vocab_size=vocab_size)
    opened = OpenCorpus(data, corpus, vocab_size)
    train_packs, validation_packs = opened.pack(("train", "validation"), opened.split, block_size)
    assert train_packs is not None, "a corpus has at least one document to train on"
    return train_packs, validation_packs, corpus


class OpenCorpus:
    """Read one prepared corpus: split its documents, and pack parts of them.

    Args:
        data: the settings of this corpus.
        corpus: what was prepared.
        vocab_size: rows of the embedding.
        source: of the mixture; empty without one.

    Raises:
        ValueError: if the files are not those that were prepared.
    """

    def __init__(self, data: DataConfig, corpus: Corpus, vocab_size: int, source: str = "") -> None:
        _check_unchanged(data, corpus)
        self.data, self.corpus = data, corpus
        self.store = TokenStore(corpus.prefix, corpus=data.corpus)
        self._vocab_size, self._source = vocab_size, source
        # documents of a .bin/.idx pair are what they are
        folder = None if corpus.num_bytes is None else Path(corpus.prefix).parent
        self.made_by = folder and read_makings(folder, corpus.num_documents)

    def origin_of(self, begin: npt.NDArray[np.integer]) -> PackOrigin:
        """Tell where documents come from, by tokens of the .bin that lie in them: [n] int64."""
        documents, lengths = self.store.documents_at(begin)
        made_by = np.zeros(len(begin), np.uint8) if self.made_by is None else self.made_by[documents]
        return PackOrigin(self._source, bucket_of(lengths), made_by)

    def split(self) -> tuple[DocumentView, DocumentView | None]:
        """Return the documents to train on, and those held out."""
        if self.corpus.num_bytes is None:
            # documents of a .bin/.idx have no names: their places are hashed
            hashes = hash_indices(self.store.num_documents)
        else:
            hashes = read_documents(Path(self.corpus.prefix).parent).hashes
        fraction = self.data.validation_fraction
        return split_store(self.store, hashes, fraction=fraction, vocab_size=self._vocab_size)

    def pack(
        self, names: Sequence[str], make_views: Callable[[], Views], block_size: int
    ) -> list[PackedDataset | None]:
        """Pack views of the documents into packs of data.seq_len; None for a view without a document.

        Args:
            names: of the views, for the files that keep the packing of a large corpus.
            make_views: makes all of them; called where a packing has to be made.
            block_size: alignment of documents in a pack.
        """
        seq_len, seed = self.data.seq_len, self.data.seed
        views = cache(make_views)
        tables = [
            self.mapped_table(name, lambda side=side: self._pack_side(views()[side], block_size), block_size)
            for side, name in enumerate(names)
        ]
        if None not in tables:
            # what was split to make them is not needed any more
            views.cache_clear()
            self.store.forget_documents()
            return [
                self.packs_of(table, lambda side=side: _given(views()[side]), block_size)
                for side, table in enumerate(tables)
            ]
        return [
            view
            and PackedDataset(view, seq_len=seq_len, block_size=block_size, seed=seed, origin=self.origin_of)
            for view in views()
        ]

    def packs_of(
        self, table: PackTable | None, view: Callable[[], DocumentView], block_size: int
    ) -> PackedDataset | None:
        """Return the packs of a table; None where it is empty."""
        if table is None or not table.num_documents:
            return None
        seq_len, seed = self.data.seq_len, self.data.seed
        sizes = {"seq_len": seq_len, "block_size": block_size, "seed": seed}
        return PackedDataset(view, table=table, reader=self.reader, origin=self.origin_of, **sizes)

    @property
    def reader(self) -> TokenReader:
        """Return what reads the tokens."""
        return TokenReader(self.store, self._vocab_size)

    def mapped_table(self, name: str, make: Callable[[], PackTable], block_size: int) -> PackTable | None:
        """Map a packing, made where it is missing; None where the corpus is small or no disk takes it.

        Args:
            name: of the packing, among those of the same documents, lengths and seed.
            make: makes it in memory.
            block_size: alignment of documents in a pack.
        """
        data = self.data
        if self.corpus.num_documents < pack_index.MIN_DOCUMENTS:
            return None
        try:
            root = cache_root(data)
        except ValueError:
            # a .bin/.idx is used in place and needs no cache
            return None
        facts = [self.corpus.content, data.validation_fraction, data.seq_len, block_size, data.seed]
        folder = pack_index.index_folder(root, facts)
        return pack_index.mapped_table(folder / name, make, seed=data.seed, block_size=block_size)

    def _pack_side(self, view: DocumentView | None, block_size: int) -> PackTable:
        """Pack one view; an empty table where it has no document."""
        sizes = {"seq_len": self.data.seq_len, "block_size": block_size, "seed": self.data.seed}
        return pack_index.empty_table(**sizes) if view is None else pack_view(view, **sizes)


def _given(view: DocumentView | None) -> DocumentView:
    assert view is not None, "its packs were asked for"
    return view


def _check_unchanged(data: DataConfig, corpus: Corpus) -> None:
    """Compare sizes with those that were seen when the corpus was prepared, perhaps on another machine."""
    # sizes alone: every worker asks, and checksums were compared when the corpus was prepared
    for name, size in corpus.sizes.items():
        path = Path(corpus.prefix).with_name(name)
        try:
            found = path.stat().st_size
        except OSError as error:
            raise corpus_error(
                data.corpus, f"{path} cannot be read here ({error.strerror}); share it"
            ) from error
        if found != size:
            raise corpus_error(
                data.corpus,
                f"{path} has {found} bytes, {size} when the run was prepared; start the run again",
            )

"""Number packs without end, and deal those of each step to the data-parallel ranks."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from msa_train.data.carried.fragments import Fragments, join
from msa_train.data.origin import PackOrigin
from msa_train.data.pack_index import EpochOrder, PackTable, table_of
from msa_train.data.packing import IGNORE_LABEL, Pack, Packs, pack_documents
from msa_train.data.split import DocumentView, TokenReader

_ORDERS_KEPT = 2
"this epoch's and, while a step is fetched ahead, the next one's"


class PackedDataset:
    """Build packs on demand from an endless row; number i is the same for all ranks and runs of a seed.

    Memory: 13 bytes per piece and 16 in each of two epochs, on every data-parallel rank, or nothing but the
    pages that are read where the table is mapped (`pack_index`); the tokens stay in the memory-mapped file. A
    pack has 16 bytes per token: 16 MiB for 1M tokens.

    Args:
        view: the documents; also a function that makes it, where the table is mapped.
        seq_len: tokens of a pack.
        block_size: alignment of documents in a pack.
        seed: order of documents and packs.
        table: the packing, where it is mapped; None: made here.
        reader: reads tokens, where `view` is a function.
        origin: tells where documents come from, by the first tokens of their pieces: [n] int64.
    """

    def __init__(
        self,
        view: DocumentView | Callable[[], DocumentView],
        *,
        seq_len: int,
        block_size: int,
        seed: int,
        table: PackTable | None = None,
        reader: TokenReader | None = None,
        origin: Callable[[npt.NDArray[np.integer]], PackOrigin] | None = None,
    ) -> None:
        self._given_view = view
        self._seq_len = seq_len
        self._block_size = block_size
        self._table = table or pack_view(self.view, seq_len=seq_len, block_size=block_size, seed=seed)
        self._reader = reader or self.view.reader
        self.origin = origin
        self._orders: dict[int, EpochOrder] = {}
        self._lock = threading.Lock()

    @property
    def view(self) -> DocumentView:
        """Return the documents."""
        if not isinstance(self._given_view, DocumentView):
            self._given_view = self._given_view()
        return self._given_view

    @property
    def folder(self) -> Path | None:
        """Return where the packing is mapped from, None where it is in memory."""
        return self._table.folder

    @property
    def reader(self) -> TokenReader:
        """Return what reads the tokens."""
        return self._reader

    @property
    def num_packs(self) -> int:
        """Return the packs of one epoch; the same for all epochs."""
        return self._table.num_packs

    @property
    def num_documents(self) -> int:
        """Return the documents of one epoch."""
        return self._table.num_documents

    @property
    def num_tokens(self) -> int:
        """Return the tokens of one epoch, without padding."""
        return self._table.num_tokens

    @property
    def padding_share(self) -> float:
        """Return the share of an epoch's positions that is padding, 0 to 1.

        Example: 3 packs of 8 tokens hold 17 tokens -> 1 - 17 / 24 = 0.29.
        """
        return 1.0 - self.num_tokens / (self.num_packs * self._seq_len)

    def __getitem__(self, index: int) -> Pack:
        """Build pack number `index`, counted over all epochs.

        Example: seq_len 8, block_size 4, a pack with the end [19, 20] of one document and another document
        [1, 2, 3]: tokens [19, 20, 0, 0, 1, 2, 3, 0], labels [20, -, -, -, 2, 3, -, -] (- is IGNORE_LABEL),
        cu_seqlens [0, 4, 8], doc_lengths [2, 3].

        Raises:
            IndexError: for a negative number.
            ValueError: if a token id has no row in the embedding.
        """
        if index < 0:
            raise IndexError(f"pack {index}: packs are counted from 0 and have no end")
        # all epochs have equally many packs, so a step finds its place without replaying earlier ones
        epoch, pack = divmod(index, self.num_packs)
        order, table = self._order(epoch), self._table
        shape = int(order.pack_order[pack])
        pieces = np.asarray(order.slot_piece[table.pack_slots[shape] : table.pack_slots[shape + 1]])
        length = table.length[pieces]
        # each piece starts on the next block boundary; the last slot takes the rest of the pack
        blocks = -(-length // self._block_size)
        cu_seqlens = np.zeros(len(pieces) + 1, np.int32)
        np.cumsum(blocks[:-1] * self._block_size, out=cu_seqlens[1:-1])
        cu_seqlens[-1] = self._seq_len
        tokens = np.zeros(self._seq_len, np.int64)
        labels = np.full(self._seq_len, IGNORE_LABEL, np.int64)
        rows = zip(
            cu_seqlens.tolist(),
            table.begin[pieces].tolist(),
            length.tolist(),
            table.goes_on[pieces].tolist(),
            strict=False,
        )
        for position, begin, count, goes_on in rows:
            # One token more than the piece has: what follows it in the document is its last label.
            text = self._reader.read(begin, count + goes_on)
            tokens[position : position + count] = text[:count]
            # a piece that is cut off has a label at its last token too; the document's last token has none
            labels[position : position + len(text) - 1] = text[1:]
        origin = self.origin and self.origin(table.begin[pieces])
        return Pack(tokens, labels, cu_seqlens, length.astype(np.int32), origin)

    def left_in_epoch(self, epoch: int, used: int) -> Fragments:
        """Return what the packs of an epoch from number `used` on hold: [n] stretches of documents.

        Memory while it lasts: about 50 bytes per piece.

        Example: an epoch of 3 packs, used 3 -> nothing; used 0 -> all documents, whole.
        """
        order, table = self._order(epoch), self._table
        is_left = np.zeros(self.num_packs, np.bool_)
        is_left[np.asarray(order.pack_order[used:])] = True
        pieces = np.asarray(order.slot_piece)[np.repeat(is_left, np.diff(table.pack_slots))]
        return join(
            Fragments(
                table.begin[pieces].astype(np.int64),
                table.length[pieces].astype(np.int64),
                table.goes_on[pieces].astype(np.uint8),
            )
        )

    def _order(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch; made by the step's thread and by the one that reads ahead."""
        with self._lock:
            if epoch not in self._orders:
                # of the orders kept, the epoch farthest from this one goes first
                while len(self._orders) >= _ORDERS_KEPT:
                    del self._orders[max(self._orders, key=lambda kept: abs(kept - epoch))]
                self._orders[epoch] = self._table.order(epoch)
            return self._orders[epoch]


def pack_view(view: DocumentView, *, seq_len: int, block_size: int, seed: int) -> PackTable:
    """Pack the documents of a view in memory."""
    assert view.lengths.any(), "a data set needs at least one token"
    packing = pack_documents(view.lengths, seq_len=seq_len, block_size=block_size, seed=seed)
    return table_of(packing, view.begin, view.lengths, block_size=block_size)


class BatchStream:
    """Read the packs of one data-parallel rank, step by step; the next step is read ahead in a thread.

    Args:
        dataset: the packs.
        prefetch: read the following step ahead.
    """

    def __init__(self, dataset: Packs, *, prefetch: bool = True) -> None:
        self._dataset = dataset
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="data") if prefetch else None
        self._ahead: tuple[range, Future[list[Pack]]] | None = None

    def packs(self, first: int, dp_rank: int, dp_size: int, global_batch_size: int) -> list[Pack]:
        """Return the packs of one rank in one step; `first` is the number of the step's first pack.

        The step's packs are the global_batch_size numbers from `first` on, whatever dp_size is; rank r
        takes every dp_size-th from the r-th on. Example: with first 4 and global_batch_size 4, rank 0 of 2
        has packs 4 and 6, rank 1 has packs 5 and 7.

        Raises:
            ValueError: if a token id has no row in the embedding, even if it was read ahead.
        """
        assert 0 <= dp_rank < dp_size, f"dp_rank={dp_rank} of dp_size={dp_size}"
        indices = _rank_indices(first, dp_rank, dp_size, global_batch_size)
        # after a rollback or a change of batch size other packs are wanted than were read ahead
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == indices:
            packs = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            packs = self._build(indices)
        if self._pool is not None:
            # read while this step computes; an error in it is raised by the step that wants these packs
            following = _rank_indices(first + global_batch_size, dp_rank, dp_size, global_batch_size)
            self._ahead = following, self._pool.submit(self._build, following)
        return packs

    def close(self) -> None:
        """End the thread; harmless when repeated. Later steps are read without it."""
        self._ahead = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _build(self, indices: range) -> list[Pack]:
        return [self._dataset[index] for index in indices]


def _rank_indices(first: int, dp_rank: int, dp_size: int, global_batch_size: int) -> range:
    return range(first + dp_rank, first + global_batch_size, dp_size)

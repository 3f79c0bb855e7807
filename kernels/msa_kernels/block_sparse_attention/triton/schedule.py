"""Work lists for the Triton kernels, built on the device without waiting for it.

Shapes: R rows (query, group), K slots, P = R * K pairs, N pool entries, I items.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.window import TokenWindow

# Slices of tensors with a value per query begin on a 16-byte border then: for others Triton compiles anew.
_QUERIES_STEP = 64


def queries_per_portion(num_queries: int, most: int) -> int:
    """Length of equal portions of at most `most` queries, a multiple of 64 where so many fit, else `most`.

    Example: 16,384 queries of which 13,797 fit are taken 8,192 at a time, 130 of which 101 fit 64 at a time.
    """
    if most < _QUERIES_STEP:
        return max(1, most)
    most -= most % _QUERIES_STEP
    portions = -(-num_queries // most)
    length = -(-num_queries // max(1, portions))
    return max(1, -(-length // _QUERIES_STEP)) * _QUERIES_STEP


@dataclass(slots=True)
class Items:
    """Items of work: up to `pairs_per_item` pairs that read one entry.

    entry: [I] int32; begin, stop: [I] int64, the item's part of `Schedule.order`; num_items: [1] int64, how
    many of the I are real (I is what fits any selection, so that the host need not know).
    first_item: [N + 1] int64, where the items of an entry begin.
    """

    entry: Tensor
    begin: Tensor
    stop: Tensor
    num_items: Tensor
    first_item: Tensor

    def splits(self) -> "Splits":
        """The items of entries that have more than one."""
        items = self.first_item.diff()
        count = torch.where(items > 1, items, 0)
        first = count.cumsum(0) - count
        entry = self.entry.long()
        place = torch.arange(entry.numel(), device=entry.device) - self.first_item[entry]
        return Splits(
            of_item=torch.where(count[entry] > 0, first[entry] + place, -1), first=first, count=count
        )


@dataclass(slots=True)
class Splits:
    """Places for what items of one entry, of several, must leave to be added up.

    Example: entries with 1, 3 and 2 items get of_item = [-1, 0, 1, 2, 3, 4], first = [0, 0, 3] and
    count = [0, 3, 2].

    of_item: [I] int64, -1 for items that are alone; first, count: [N] int64, the places of an entry.
    """

    of_item: Tensor
    first: Tensor
    count: Tensor


@dataclass(slots=True)
class Schedule:
    """Pairs (row * K + slot) sorted by the entry they read.

    First those that see the whole block, by entry, then those that see a part of it, by entry, then the
    unused.

    order: [P] int32; offsets: [2N + 1] int64, where each entry's pairs begin in `order`. used: [P] uint8, 1
    where the pair is on a list.
    """

    order: Tensor
    offsets: Tensor
    used: Tensor

    @property
    def num_entries(self) -> int:
        """N."""
        return self.offsets.numel() // 2

    def items(self, *, masked: bool, pairs_per_item: int, every_entry: bool = False) -> Items:
        """Split the lists of one kind into items, entries ascending, pairs of an entry in order.

        Example (N = 2, pairs_per_item 2, masked False): offsets [0, 3, 4, ...] has 3 pairs of entry 0 and 1
        of entry 1, so entry = [0, 0, 1, ...], begin = [0, 2, 3, ...], stop = [2, 3, 4, ...], num_items = 3.

        Args:
            masked: the pairs that see a part of the block, or those that see all of it.
            pairs_per_item: longest item.
            every_entry: give an entry without pairs one empty item.
        """
        N, device = self.num_entries, self.offsets.device
        offsets = self.offsets[N:] if masked else self.offsets[: N + 1]
        items = (offsets.diff() + pairs_per_item - 1) // pairs_per_item
        if every_entry:
            items.clamp_(min=1)
        first_item = torch.zeros(N + 1, dtype=torch.int64, device=device)
        torch.cumsum(items, 0, out=first_item[1:])
        most = self.order.numel() // pairs_per_item + (N if every_entry else min(N, self.order.numel()))
        item = torch.arange(most, device=device)
        entry = torch.searchsorted(first_item[1:], item, right=True).clamp_(max=N - 1)
        begin = offsets[entry] + (item - first_item[entry]) * pairs_per_item
        stop = torch.minimum(begin + pairs_per_item, offsets[entry + 1])
        return Items(
            entry=entry.to(torch.int32),
            begin=begin,
            stop=stop,
            num_items=first_item[-1:],
            first_item=first_item,
        )


def build_schedule(
    entries: Tensor,
    block: Tensor,
    position: Tensor,
    window: TokenWindow | None,
    *,
    block_size: int,
) -> Schedule:
    """Sort pairs by entry, keeping the order of rows: one stable radix sort, the same on every run.

    Args:
        entries: [T, M, K] int64 pool entry per slot, -1 for none.
        block: [N] int64 block ids of the entries.
        position: [T] int64; window: of the same queries, or None.
        block_size: tokens per block.
    """
    num_entries = block.numel()
    used = entries >= 0
    begin = block[entries.clamp(min=0)] * block_size
    partial = begin + block_size > position[:, None, None] + 1
    if window is not None:
        start, sink_stop = window.start[:, None, None], window.sink_stop[:, None, None]
        cut = (begin < start) & (begin >= sink_stop)
        # Blocks that lie wholly before the window hold nothing that the query sees.
        used &= ~cut | (begin + block_size > start)
        partial |= cut
    key = torch.where(used, entries + num_entries * partial, 2 * num_entries).to(torch.int32).flatten()
    key, order = torch.sort(key, stable=True)
    # Half the bytes: the kernels wait for a few of these ids at a time.
    order = order.to(torch.int32)
    borders = torch.arange(2 * num_entries + 1, dtype=torch.int32, device=key.device)
    return Schedule(
        order=order, offsets=torch.searchsorted(key, borders), used=used.flatten().to(torch.uint8)
    )

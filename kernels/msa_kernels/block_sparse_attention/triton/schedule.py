"""List the work of the Triton kernels, built on the device without waiting for it.

Shapes: T queries, M KV heads, R = T * M rows, K slots, P = R * K pairs, N physical blocks, I items. A pair
is a (row, slot) pair, numbered row * K + slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.window import TokenWindow

# Slices of tensors with a value per query begin on a 16-byte border then: for others Triton compiles anew.
_QUERIES_STEP = 64


def queries_per_portion(num_queries: int, most: int) -> int:
    """Choose equal portions of at most `most` queries, a multiple of 64 where so many fit, else `most`.

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
    """Hold items of work: up to `pairs_per_item` pairs that read one physical block."""

    physical_block: Tensor
    """[I] int32, the block that each item reads."""
    begin: Tensor
    """[I] int64, where the item's part of `Schedule.order` begins."""
    stop: Tensor
    """[I] int64, where it ends."""
    num_items: Tensor
    """[1] int64, how many of the I are real: I is what fits any selection, so that the host need not know."""
    first_item: Tensor
    """[N + 1] int64, where the items of each physical block begin."""

    def splits(self) -> "Splits":
        """Find the items of blocks that have more than one, and number their places."""
        items = self.first_item.diff()
        count = torch.where(items > 1, items, 0)
        first = count.cumsum(0) - count
        block = self.physical_block.long()
        place = torch.arange(block.numel(), device=block.device) - self.first_item[block]
        of_item = torch.where(count[block] > 0, first[block] + place, -1)
        return Splits(of_item=of_item, first=first, count=count)


@dataclass(slots=True)
class Splits:
    """Give places to the items of one physical block, of several, whose results are added up later.

    Example: blocks with 1, 3 and 2 items get of_item = [-1, 0, 1, 2, 3, 4], first = [0, 0, 3] and
    count = [0, 3, 2].
    """

    of_item: Tensor
    """[I] int64, the item's place, -1 for items that are alone."""
    first: Tensor
    """[N] int64, the first place of each physical block."""
    count: Tensor
    """[N] int64, its number of places."""


@dataclass(slots=True)
class Schedule:
    """Hold (row, slot) pairs sorted by the physical block they read.

    First those that see the whole block, by block, then those that see a part of it, by block, then the
    unused.
    """

    order: Tensor
    """[P] int32, the pairs, row * K + slot."""
    offsets: Tensor
    """[2N + 1] int64, where each block's pairs begin in `order`: N whole blocks, then N partly seen ones."""
    used: Tensor
    """[P] uint8, 1 where the pair is on a list."""

    @property
    def num_physical_blocks(self) -> int:
        """Count the physical blocks, N."""
        return self.offsets.numel() // 2

    def items(self, *, pairs_per_item: int, every_block: bool = False) -> tuple[Items, Items]:
        """Split the lists into items: of wholly seen blocks, and of partly seen ones.

        In each, physical blocks ascend, and pairs of a block keep their order. One row of small operators
        makes both: with few tokens to a rank, these are what a call costs.

        Example (N = 2, pairs_per_item 2): offsets [0, 3, 4, ...] have 3 pairs of block 0 and 1 of block 1, so
        of the first physical_block = [0, 0, 1, ...], begin = [0, 2, 3, ...], stop = [2, 3, 4, ...], num_items
        = 3.

        Args:
            pairs_per_item: longest item.
            every_block: give a block without pairs that see all of it one empty item.
        """
        N, num_pairs = self.num_physical_blocks, self.order.numel()
        first_pair, last_pair = self.offsets[:-1].view(2, N), self.offsets[1:].view(2, N)
        items = (last_pair - first_pair + pairs_per_item - 1) // pairs_per_item
        if every_block:
            items[0].clamp_(min=1)
        next_item = items.cumsum(1)
        first_item = torch.nn.functional.pad(next_item, (1, 0))
        # Full items hold all P pairs at most, and each block adds one that is not full: no selection needs
        # more.
        full, some = num_pairs // pairs_per_item, min(N, num_pairs)
        most = (full + (N if every_block else some), full + some)
        item = torch.arange(_aligned(max(most)), device=self.offsets.device).repeat(2, 1)
        block = torch.searchsorted(next_item, item, right=True).clamp_(max=N - 1)
        begin = first_pair.gather(1, block) + (item - first_item.gather(1, block)) * pairs_per_item
        stop = torch.minimum(begin + pairs_per_item, last_pair.gather(1, block))
        physical_block, num_items = block.to(torch.int32), next_item[:, -1:].contiguous()
        whole, partial = (
            Items(
                physical_block=physical_block[kind, : most[kind]],
                begin=begin[kind, : most[kind]],
                stop=stop[kind, : most[kind]],
                num_items=num_items[kind],
                first_item=first_item[kind],
            )
            for kind in range(2)
        )
        return whole, partial


def _aligned(length: int) -> int:
    """Round up to where a second row of int32 begins on a 16-byte border: for others Triton compiles anew."""
    return -(-length // 4) * 4


def build_schedule(
    block_table: Tensor,
    block: Tensor,
    position: Tensor,
    window: TokenWindow | None,
    *,
    block_size: int,
) -> Schedule:
    """Sort pairs by physical block, keeping the order of rows: one stable radix sort, the same on every run.

    Example (M 1, K 2, N 2, block_size 4): queries at positions 7, 8, 9 with the block table [[0, 1], [1,
    -1], [1, 0]] and block = [0, 1] hold pairs 0 to 5. Pair 1 is query 7's own block, seen to its last token,
    hence whole like all others; pair 3 is unused. The keys are [0, 1, 1, 4, 1, 0] (4 = 2N: unused), so order
    is [0, 5, 1, 2, 4, 3] and offsets [0, 2, 5, 5, 5]. With the first query at position 6 pair 1 sees a part
    of its block: its key is N + 1 = 3, order [0, 5, 2, 4, 1, 3] and offsets [0, 2, 4, 4, 5].

    Args:
        block_table: [T, M, K] int64 physical block per slot, -1 for none.
        block: [N] int64 global ids of the physical blocks.
        position: [T] int64; window: of the same queries, or None.
        block_size: tokens per block.
    """
    num_physical_blocks = block.numel()
    used = block_table >= 0
    begin = block[block_table.clamp(min=0)] * block_size
    partial = begin + block_size > position[:, None, None] + 1
    if window is not None:
        start, sink_stop = window.start[:, None, None], window.sink_stop[:, None, None]
        cut = (begin < start) & (begin >= sink_stop)
        # Blocks that lie wholly before the window hold nothing that the query sees.
        used &= ~cut | (begin + block_size > start)
        partial |= cut
    # One sort for both kinds: 0 to N - 1 are whole blocks, N to 2N - 1 partly seen ones, 2N is unused.
    unused = 2 * num_physical_blocks
    key = torch.where(used, block_table + num_physical_blocks * partial, unused).to(torch.int32).flatten()
    key, order = torch.sort(key, stable=True)
    # Half the bytes: the kernels wait for a few of these ids at a time.
    order = order.to(torch.int32)
    borders = torch.arange(2 * num_physical_blocks + 1, dtype=torch.int32, device=key.device)
    return Schedule(
        order=order, offsets=torch.searchsorted(key, borders), used=used.flatten().to(torch.uint8)
    )

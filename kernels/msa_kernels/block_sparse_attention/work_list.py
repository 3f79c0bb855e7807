"""Turn "which blocks does a query read" into "which queries read a block", in equal portions.

Shapes: R query rows (query, KV head), K top-k slots per row, N physical blocks of a pool, W rows per item, I
items. A pair is a (row, slot) pair, numbered row * K + slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class WorkList:
    """Hold items of work: up to W (row, slot) pairs that read the same physical block."""

    pair: Tensor
    """[I, W] int64, row * K + slot of each pair, -1 where the item is not full."""
    physical_block: Tensor
    """[I] int64, the block that each item reads, ascending."""


def build_work_list(
    block_table: Tensor, keep: Tensor, *, num_physical_blocks: int, rows_per_item: int
) -> WorkList:
    """Group (row, slot) pairs by the physical block they read.

    Example (K = 2, W = 2): the block table [[5, 7], [7, -1], [7, 5]] holds pairs 0 to 5. Block 5 is read by
    pairs 0 and 5, block 7 by pairs 1, 2 and 4, so pair = [[0, 5], [1, 2], [4, -1]], physical_block = [5, 7,
    7].

    Args:
        block_table: [R, K] int64 physical block per row and slot, -1 for none.
        keep: [R, K] bool, pairs to put on this list; must be False where the block table has -1.
        num_physical_blocks: N.
        rows_per_item: W.
    """
    device = block_table.device
    pair = keep.flatten().nonzero().squeeze(-1)
    physical_block = block_table.flatten()[pair]
    # stable: a block's pairs stay in the order of rows, so that every sum has one order
    order = torch.argsort(physical_block, stable=True)
    pair, physical_block = pair[order], physical_block[order]
    # The example: count 2, 3 of blocks 5, 7; items 1, 2; first_item 0, 1; first_pair 0, 2.
    count = torch.bincount(physical_block, minlength=num_physical_blocks)
    items = (count + rows_per_item - 1) // rows_per_item
    first_item = items.cumsum(0) - items
    first_pair = count.cumsum(0) - count
    # place of a pair among those of its block: 0, 1, 0, 1, 2
    rank = torch.arange(pair.numel(), device=device) - first_pair[physical_block]
    num_items = int(items.sum())
    table = torch.full((num_items * rows_per_item,), -1, dtype=torch.int64, device=device)
    table[first_item[physical_block] * rows_per_item + rank] = pair
    of_item = torch.repeat_interleave(torch.arange(num_physical_blocks, device=device), items)
    return WorkList(pair=table.view(num_items, rows_per_item), physical_block=of_item)

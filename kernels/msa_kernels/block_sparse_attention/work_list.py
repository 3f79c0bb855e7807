"""Turns "which blocks does a query read" into "which queries read a block", in equal portions.

Shapes: R query rows (query, group), K top-k slots per row, N pool entries, W rows per item.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class WorkList:
    """Items of work: up to W (row, slot) pairs that read the same pool entry.

    pair: [I, W] int64, row * K + slot of each pair, -1 where the item is not full.
    entry: [I] int64, the pool entry of each item, ascending.
    """

    pair: Tensor
    entry: Tensor


def build_work_list(entries: Tensor, keep: Tensor, *, num_entries: int, rows_per_item: int) -> WorkList:
    """Group (row, slot) pairs by the pool entry they read.

    Example (K = 2, W = 2): entries [[5, 7], [7, -1], [7, 5]] holds pairs 0..5. Entry 5 is read by
    pairs 0 and 5, entry 7 by pairs 1, 2 and 4, so pair = [[0, 5], [1, 2], [4, -1]], entry = [5, 7, 7].

    Args:
        entries: [R, K] int64 pool entry per row and slot, -1 for none.
        keep: [R, K] bool, pairs to put on this list; must be False where entries is -1.
        num_entries: N.
        rows_per_item: W.
    """
    device = entries.device
    pair = keep.flatten().nonzero().squeeze(-1)
    entry = entries.flatten()[pair]
    order = torch.argsort(entry, stable=True)
    pair, entry = pair[order], entry[order]
    count = torch.bincount(entry, minlength=num_entries)
    items = (count + rows_per_item - 1) // rows_per_item
    first_item = items.cumsum(0) - items
    first_pair = count.cumsum(0) - count
    rank = torch.arange(pair.numel(), device=device) - first_pair[entry]
    num_items = int(items.sum())
    table = torch.full((num_items * rows_per_item,), -1, dtype=torch.int64, device=device)
    table[first_item[entry] * rows_per_item + rank] = pair
    item_entry = torch.repeat_interleave(torch.arange(num_entries, device=device), items)
    return WorkList(pair=table.view(num_items, rows_per_item), entry=item_entry)

"""Find the blocks that hold a query's sliding window, and the tokens of them that it sees.

Shapes: T queries, W slots, enough for the blocks of a window and of the sink.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class TokenWindow:
    """Limit the tokens j of its blocks that a query sees to j >= start or j < sink_stop, and to its past."""

    start: Tensor
    """[T] int64, first position of the window in the pack, in tokens."""
    sink_stop: Tensor
    """[T] int64, position where the sink ends, on a block border; the document's start if there is none."""


def window_blocks(
    position: Tensor,
    doc_start: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    window: int,
    sink_blocks: int = 0,
    query_valid: Tensor | None = None,
) -> tuple[Tensor, TokenWindow]:
    """Select blocks and tokens of a causal sliding window within documents.

    A query sees the last `window` tokens up to itself and the first `sink_blocks` blocks of its document.

    Example (block_size 4, window 6, one document, sink_blocks 1): the query at position 13 sees tokens 8 to
    13 and 0 to 3, so blocks [0, 2, 3]; start 8, sink_stop 4.

    Args:
        position: [T] int64, positions of the queries in the pack.
        doc_start: [T] int64, where the query's document begins, on a block boundary.
        block_size: tokens per block.
        num_blocks: blocks of the pack.
        window: tokens that a query sees, itself included; at least 1.
        sink_blocks: first blocks of the document that every query of it sees.
        query_valid: [T] bool, False for padding queries, which select nothing. None: all valid.

    Returns:
        block_indices [T, W] int32, global block ids ascending, -1 on the right; and the TokenWindow.

    Raises:
        ValueError: on a window below 1 or a negative number of sink blocks.
    """
    if window < 1:
        raise ValueError(f"window={window}: must be at least 1, the query itself")
    if sink_blocks < 0:
        raise ValueError(f"sink_blocks={sink_blocks}: must not be negative; use 0 for none")
    device = position.device
    start = torch.maximum(doc_start, position - (window - 1))
    first_block = (start // block_size)[:, None]
    # A window touches most blocks when it ends on the first token of one.
    width = min((window + block_size - 2) // block_size + 1, num_blocks)
    # candidates: the last `width` blocks up to the query's own, and the first blocks of the document
    recent = (position // block_size)[:, None] - torch.arange(width, device=device)
    sink = (doc_start // block_size)[:, None] + torch.arange(min(sink_blocks, num_blocks), device=device)
    taken = torch.cat((recent >= first_block, sink < first_block), dim=1)
    if query_valid is not None:
        taken &= query_valid[:, None]
    # num_blocks stands for none, so that sorting brings it to the right; a block of both counts as recent
    ids = torch.cat((recent, sink), dim=1).masked_fill_(~taken, num_blocks).sort(dim=1).values
    ids = ids[:, :num_blocks].masked_fill(ids[:, :num_blocks] == num_blocks, -1)
    return ids.to(torch.int32), TokenWindow(start=start, sink_stop=doc_start + sink_blocks * block_size)

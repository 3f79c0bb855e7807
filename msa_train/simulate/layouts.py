"""Placements of the sequence layouts."""

from collections.abc import Sequence

import numpy as np

from msa_train.simulate.placement import Placement

LAYOUTS = ("contiguous", "zigzag")


def place(
    layout: str, *, seq_len: int, block_size: int, cp_size: int, cu_seqlens: Sequence[int] | None = None
) -> Placement:
    """Blocks of all ranks.

    Args:
        layout: one of LAYOUTS.
        seq_len: tokens of the pack.
        block_size: tokens per block.
        cp_size: ranks.
        cu_seqlens: block-aligned document starts, the last entry is seq_len; None: one document.

    Raises:
        ValueError: if the shards are not whole blocks, or documents do not start on block boundaries.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout}: must be one of {', '.join(LAYOUTS)}")
    pieces = {"contiguous": 1, "zigzag": 2}[layout] * cp_size
    if seq_len <= 0 or seq_len % (pieces * block_size):
        raise ValueError(
            f"seq_len={seq_len}: must be a positive multiple of {pieces} pieces * block_size={block_size} = "
            f"{pieces * block_size} with layout={layout} and cp_size={cp_size}"
        )
    num_blocks = seq_len // block_size
    piece = np.arange(num_blocks, dtype=np.int64) // (num_blocks // pieces)
    owner = np.minimum(piece, pieces - 1 - piece) if layout == "zigzag" else piece
    order = np.argsort(owner, kind="stable").reshape(cp_size, -1)
    return Placement(seq_len, block_size, cp_size, owner, order, _doc_start(seq_len, block_size, cu_seqlens))


def _doc_start(seq_len: int, block_size: int, cu_seqlens: Sequence[int] | None) -> np.ndarray:
    starts = np.asarray([0, seq_len] if cu_seqlens is None else cu_seqlens, dtype=np.int64)
    if starts.shape[0] < 2 or starts[0] != 0 or starts[-1] != seq_len or (np.diff(starts) <= 0).any():
        raise ValueError(f"cu_seqlens={_short(starts)}: must rise from 0 to seq_len={seq_len}")
    if (starts % block_size).any():
        raise ValueError(
            f"cu_seqlens={_short(starts)}: documents must start on multiples of block_size={block_size}"
        )
    lengths = np.diff(starts) // block_size
    return np.repeat(starts[:-1] // block_size, lengths)


def _short(values: np.ndarray) -> str:
    text = ", ".join(map(str, values[:6].tolist()))
    return f"[{text}{', ...' if values.shape[0] > 6 else ''}]"

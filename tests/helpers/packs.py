"""Packs built by hand, without a corpus."""

import numpy as np

from msa_train.data import IGNORE_LABEL, Pack


def make_pack(lengths: list[int], *, seq_len: int, block_size: int, vocab_size: int, seed: int) -> Pack:
    """Documents of the given real lengths, each on a block boundary; free space belongs to the last one."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros(seq_len, dtype=np.int64)
    labels = np.full(seq_len, IGNORE_LABEL, dtype=np.int64)
    starts, position = [], 0
    for length in lengths:
        starts.append(position)
        text = rng.integers(1, vocab_size, length)
        tokens[position : position + length] = text
        labels[position : position + length - 1] = text[1:]
        position += -(-length // block_size) * block_size
    assert position <= seq_len, f"documents need {position} of {seq_len} tokens"
    return Pack(
        tokens=tokens,
        labels=labels,
        cu_seqlens=np.array([*starts, seq_len], dtype=np.int32),
        doc_lengths=np.array(lengths, dtype=np.int32),
    )

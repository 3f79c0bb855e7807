"""Replay selections: the interface, and files of recorded ones.

A recording is a folder of `*.npz` parts, or one such file; each part holds the queries of some tokens:

    format            "msa_selections 1"
    seq_len, block_size, num_kv_heads, topk, first_token, num_tokens, chunk_tokens     integers
    cu_seqlens        [num_docs + 1] document starts and seq_len
    layers            [L] layer numbers
    needed_bits       [L, C, M, ceil(NB / 8)] uint8: bit b of KV head m in chunk c, most significant first:
                      does any of the chunk's queries select block b? C = num_tokens / chunk_tokens
    sample_position   [Q] positions of sampled queries
    sample_blocks     [L, Q, M, topk] int32, their selection, -1 for none
    source            text: what was recorded

Chunks are unions over neighbouring queries, so that a recording of millions of tokens stays small and still
serves every layout and number of ranks whose shards are whole chunks. Its bits take C * M * NB / 8 bytes per
layer, which grows with the square of the length: 1M tokens in chunks and blocks of 1,024 and 128 tokens with
4 KV heads are 1024 * 4 * 8192 / 8 = 4 MiB, 4M tokens 64 MiB.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from msa_train.parallel.selection_file import Bits
from msa_train.simulate.inputs.placement import Placement
from msa_train.simulate.selections.files import read_part


class Selections(Protocol):
    """Answer what the replay asks of a selection; M KV heads, NB blocks, P ranks."""

    def needed(self, placement: Placement, rank: int) -> Bits:
        """Mark the [M, NB] bool blocks that queries of `rank` select, its own ones included."""
        ...

    def local_share(self, placement: Placement) -> NDArray[np.float64]:
        """Return [P] float64, the share of a rank's (query, block) pairs whose block it holds itself."""
        ...

    def describe(self) -> str:
        """Describe the selection in one line for reports."""
        ...


@dataclass(slots=True)
class RecordedSelections:
    """Replay one layer of a recording.

    Example: 4 blocks of 2 tokens, one KV head, chunks of 2 tokens that select blocks {0}, {0, 1}, {1, 2}, {0,
    3}: bits [[[128]], [[192]], [[96]], [[144]]]. On 2 contiguous ranks, rank 1 needs blocks [1, 1, 1, 1],
    rank 0 [1, 1, 0, 0].
    """

    layer: int
    "number of the layer in its model"
    seq_len: int
    "tokens of the pack"
    block_size: int
    "tokens per block"
    num_kv_heads: int
    "M"
    topk: int
    "blocks that a query selects per KV head"
    chunk_tokens: int
    "queries whose selections are kept as one union"
    cu_seqlens: list[int]
    "[num_docs + 1] document starts and seq_len, tokens"
    bits: NDArray[np.uint8]
    "[C, M, ceil(NB / 8)] uint8, most significant bit first, the whole pack"
    sample_position: NDArray[np.int64]
    "[Q] positions of sampled queries, tokens"
    sample_blocks: NDArray[np.int32]
    "[Q, M, topk] blocks that they select, -1 for none"
    source: str
    "text: what was recorded"

    def needed(self, placement: Placement, rank: int) -> Bits:
        """See Selections.needed."""
        self._check(placement)
        # a shard of whole chunks touches exactly as many blocks as its chunks have, else it cuts one
        per_chunk = self.chunk_tokens // self.block_size
        chunks = np.unique(placement.order[rank] // per_chunk)
        if chunks.shape[0] * per_chunk != placement.order.shape[1]:
            raise ValueError(
                f"cp_size={placement.cp_size}: its shards cut the recording's chunks of {self.chunk_tokens} "
                "tokens; use fewer ranks, a coarser layout or a recording with smaller chunk_tokens"
            )
        union = np.bitwise_or.reduce(self.bits[chunks], axis=0)
        return np.unpackbits(union, axis=-1, count=placement.num_blocks).astype(bool)

    def local_share(self, placement: Placement) -> NDArray[np.float64]:
        """See Selections.local_share; ranks without a sampled query get the mean."""
        self._check(placement)
        # counts per rank of the sampled queries: all selected blocks, and those that the rank holds
        home = placement.owner[self.sample_position // self.block_size]
        valid = self.sample_blocks >= 0
        local = valid & (placement.owner[np.maximum(self.sample_blocks, 0)] == home[:, None, None])
        total = np.bincount(home, valid.sum(axis=(1, 2)), minlength=placement.cp_size)
        own = np.bincount(home, local.sum(axis=(1, 2)), minlength=placement.cp_size)
        mean = own.sum() / max(total.sum(), 1)
        return np.where(total > 0, own / np.maximum(total, 1), mean)

    def describe(self) -> str:
        """See Selections.describe."""
        return f"recorded, layer {self.layer}: {self.source}"

    def _check(self, placement: Placement) -> None:
        if (placement.seq_len, placement.block_size) != (self.seq_len, self.block_size):
            raise ValueError(
                f"seq_len={placement.seq_len}, block_size={placement.block_size}: the recording has "
                f"{self.seq_len} and {self.block_size}; use these"
            )


def read_selections(path: Path) -> list[RecordedSelections]:
    """Read the layers of a recording.

    Args:
        path: a part, or a folder of parts that together cover the pack.

    Raises:
        ValueError: if parts are missing, do not fit each other or are no recording.
    """
    paths = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"{path}: holds no .npz part of a recording; name another folder")
    parts = sorted((read_part(part) for part in paths), key=lambda part: int(part["first_token"]))
    first = parts[0]
    for name in ("seq_len", "block_size", "num_kv_heads", "topk", "chunk_tokens", "cu_seqlens", "layers"):
        if any(not np.array_equal(part[name], first[name]) for part in parts):
            raise ValueError(
                f"{path}: its parts differ in {name}; keep the parts of one recording in a folder"
            )
    # parts are sorted by their first token, so a gap or an overlap shows at the next part
    position = 0
    for part in parts:
        if int(part["first_token"]) != position:
            raise ValueError(f"{path}: tokens from {position} on are not covered; add the missing part")
        position += int(part["num_tokens"])
    if position != int(first["seq_len"]):
        raise ValueError(
            f"{path}: covers {position} of seq_len={int(first['seq_len'])} tokens; add the missing parts"
        )
    return [
        RecordedSelections(
            layer=int(layer),
            seq_len=int(first["seq_len"]),
            block_size=int(first["block_size"]),
            num_kv_heads=int(first["num_kv_heads"]),
            topk=int(first["topk"]),
            chunk_tokens=int(first["chunk_tokens"]),
            cu_seqlens=[int(x) for x in first["cu_seqlens"]],
            bits=np.concatenate([part["needed_bits"][row] for part in parts]),
            sample_position=np.concatenate([part["sample_position"] for part in parts]),
            sample_blocks=np.concatenate([part["sample_blocks"][row] for part in parts]),
            source=str(first["source"]),
        )
        for row, layer in enumerate(first["layers"])
    ]

"""Selections to replay: the interface, and files of recorded ones.

A recording is a folder of `*.npz` parts, or one such file; each part holds the queries of some tokens:

    format            "msa_selections 1"
    seq_len, block_size, num_kv_heads, topk, first_token, num_tokens, chunk_tokens     integers
    cu_seqlens        [num_docs + 1] document starts
    layers            [L] layer numbers
    needed_bits       [L, C, M, ceil(NB / 8)] uint8: bit b of group m in chunk c, most significant first:
                      does any of the chunk's queries select block b? C = num_tokens / chunk_tokens
    sample_position   [Q] positions of sampled queries
    sample_blocks     [L, Q, M, topk] int32, their selection, -1 for none
    source            text: what was recorded

Chunks are unions over neighbouring queries, so that a recording of millions of tokens stays small and still
serves every layout and number of ranks whose shards are whole chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from msa_train.runtime.atomic_files import new_file
from msa_train.simulate.inputs.placement import Placement
from msa_train.simulate.selections.files import FORMAT, read_part

Bits = NDArray[np.bool_]


class Selections(Protocol):
    """What the replay asks of a selection."""

    def needed(self, placement: Placement, rank: int) -> Bits:
        """[M, NB] blocks that queries of `rank` select, its own ones included."""
        ...

    def local_share(self, placement: Placement) -> NDArray[np.float64]:
        """[P] share of a rank's (query, block) pairs whose block it holds itself."""
        ...

    def describe(self) -> str:
        """One line for reports."""
        ...


@dataclass(slots=True)
class SelectionRecorder:
    """Collects the selections of some layers over consecutive tokens, e.g. of one rank, and writes them.

    Args:
        seq_len, block_size, num_kv_heads, topk: of the pack and the model.
        first_token, num_tokens: the tokens whose queries are recorded, whole chunks.
        chunk_tokens: queries per recorded union; smaller ones serve more layouts and cost more space.
        cu_seqlens: document starts, the last entry is seq_len.
        num_samples: queries kept one by one.
    """

    seq_len: int
    block_size: int
    num_kv_heads: int
    topk: int
    first_token: int
    num_tokens: int
    chunk_tokens: int
    cu_seqlens: Sequence[int]
    num_samples: int = 256
    _bits: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    _samples: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("seq_len", "first_token", "num_tokens"):
            if getattr(self, name) % self.chunk_tokens:
                raise ValueError(
                    f"{name}={getattr(self, name)}: must be a multiple of chunk_tokens={self.chunk_tokens}"
                )
        if self.chunk_tokens % self.block_size:
            raise ValueError(
                f"chunk_tokens={self.chunk_tokens}: must be a multiple of block_size={self.block_size}"
            )

    @property
    def sample_rows(self) -> NDArray[np.int64]:
        """Rows of the sampled queries, spread evenly."""
        count = min(self.num_samples, self.num_tokens)
        return np.arange(count, dtype=np.int64) * self.num_tokens // count

    @property
    def has_layers(self) -> bool:
        """Whether anything was added."""
        return bool(self._bits)

    def add(self, layer: int, block_indices: NDArray[np.integer]) -> None:
        """Record a layer.

        Args:
            layer: its number; a layer recorded twice keeps the union (several microbatches, one selection
            each). block_indices: [num_tokens, num_kv_heads, topk] global block ids, -1 for none, on the
            host.
        """
        shape = (self.num_tokens, self.num_kv_heads, self.topk)
        if block_indices.shape != shape:
            raise ValueError(f"block_indices.shape={block_indices.shape}: must be {shape}")
        bits = np.packbits(self._needed(block_indices), axis=-1)
        self._bits[layer] = self._bits[layer] | bits if layer in self._bits else bits
        self._samples.setdefault(layer, block_indices[self.sample_rows].astype(np.int32))

    def _needed(self, block_indices: NDArray[np.integer]) -> Bits:
        """[C, M, NB], one column more at the front that takes the -1."""
        num_blocks, chunks = self.seq_len // self.block_size, self.num_tokens // self.chunk_tokens
        needed = np.zeros((chunks, self.num_kv_heads, num_blocks + 1), dtype=bool)
        chunk = np.arange(self.num_tokens)[:, None, None] // self.chunk_tokens
        group = np.arange(self.num_kv_heads)[None, :, None]
        needed[chunk, group, block_indices.astype(np.int64) + 1] = True
        return needed[..., 1:]

    def save(self, path: Path, source: str) -> None:
        """Write a part; source says what was recorded (run, step, data)."""
        if not self._bits:
            raise ValueError(f"{path}: no layer was recorded; call add first")
        layers = sorted(self._bits)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, "wb") as file:
            self._write(file, layers, source)

    def _write(self, file: IO[bytes], layers: list[int], source: str) -> None:
        np.savez_compressed(
            file,
            format=FORMAT,
            seq_len=self.seq_len,
            block_size=self.block_size,
            num_kv_heads=self.num_kv_heads,
            topk=self.topk,
            first_token=self.first_token,
            num_tokens=self.num_tokens,
            chunk_tokens=self.chunk_tokens,
            cu_seqlens=np.asarray(self.cu_seqlens, dtype=np.int64),
            layers=np.asarray(layers),
            needed_bits=np.stack([self._bits[layer] for layer in layers]),
            sample_position=self.sample_rows + self.first_token,
            sample_blocks=np.stack([self._samples[layer] for layer in layers]),
            source=source,
        )


@dataclass(slots=True)
class RecordedSelections:
    """One layer of a recording.

    bits: [C, M, ceil(NB / 8)] uint8, the whole pack; sample_position [Q], sample_blocks [Q, M, topk].
    """

    layer: int
    seq_len: int
    block_size: int
    num_kv_heads: int
    topk: int
    chunk_tokens: int
    cu_seqlens: list[int]
    bits: NDArray[np.uint8]
    sample_position: NDArray[np.int64]
    sample_blocks: NDArray[np.int32]
    source: str

    def needed(self, placement: Placement, rank: int) -> Bits:
        """See Selections.needed."""
        self._check(placement)
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
    """The layers of a recording.

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

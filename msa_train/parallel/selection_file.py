"""Write the blocks that queries select: recordings that `msa_train.simulate` replays."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from msa_train.runtime.atomic_files import new_file

# First entry of a file; the number is the version.
FORMAT = "msa_selections 1"


Bits = NDArray[np.bool_]


@dataclass(slots=True)
class SelectionRecorder:
    """Collect the selections of some layers over consecutive tokens, e.g. of one rank, and write them.

    A layer takes num_tokens / chunk_tokens * num_kv_heads * seq_len / block_size / 8 bytes before
    compression: 16 KiB for 4,096 tokens of 1M in chunks of 1,024 (block 128, 4 heads).

    Raises:
        ValueError: tokens do not come in whole chunks, or chunks in whole blocks.
    """

    seq_len: int
    "tokens of the pack"
    block_size: int
    "tokens of a block"
    num_kv_heads: int
    "KV heads whose selections are recorded"
    topk: int
    "blocks that a query selects"
    first_token: int
    "position of the first recorded query, a whole number of chunks"
    num_tokens: int
    "recorded queries, whole chunks"
    chunk_tokens: int
    "queries per recorded union; smaller ones serve more layouts and cost more space"
    cu_seqlens: Sequence[int]
    "document starts; the last entry is seq_len"
    num_samples: int = 256
    "queries kept one by one"
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
        """Spread the sampled queries evenly: [num_samples] int64 rows.

        Example: 3 samples of 8 tokens -> [0, 2, 5].
        """
        count = min(self.num_samples, self.num_tokens)
        return np.arange(count, dtype=np.int64) * self.num_tokens // count

    @property
    def has_layers(self) -> bool:
        """Tell whether anything was added."""
        return bool(self._bits)

    def add(self, layer: int, block_indices: NDArray[np.integer]) -> None:
        """Record a layer.

        Args:
            layer: its number; a layer recorded twice keeps the union (several microbatches, one selection
                each).
            block_indices: [num_tokens, num_kv_heads, topk] block ids of the pack, -1 for none, on the host.

        Raises:
            ValueError: block_indices has another shape.
        """
        shape = (self.num_tokens, self.num_kv_heads, self.topk)
        if block_indices.shape != shape:
            raise ValueError(f"block_indices.shape={block_indices.shape}: must be {shape}")
        # One bit per block: a byte each would be 8 times the memory of a run's recording.
        bits = np.packbits(self._needed(block_indices), axis=-1)
        self._bits[layer] = self._bits[layer] | bits if layer in self._bits else bits
        self._samples.setdefault(layer, block_indices[self.sample_rows].astype(np.int32))

    def _needed(self, block_indices: NDArray[np.integer]) -> Bits:
        """Mark the blocks that each chunk selects: [chunks, num_kv_heads, blocks] bool.

        Example: chunks of 2 tokens, 4 blocks, one head: selections [[0], [2], [3], [-1]] -> [[[1, 0, 1, 0]],
        [[0, 0, 0, 1]]].
        """
        # One column more at the front takes the -1 and is cut off.
        num_blocks, chunks = self.seq_len // self.block_size, self.num_tokens // self.chunk_tokens
        needed = np.zeros((chunks, self.num_kv_heads, num_blocks + 1), dtype=bool)
        chunk = np.arange(self.num_tokens)[:, None, None] // self.chunk_tokens
        group = np.arange(self.num_kv_heads)[None, :, None]
        needed[chunk, group, block_indices.astype(np.int64) + 1] = True
        return needed[..., 1:]

    def save(self, path: Path, source: str) -> None:
        """Write what was added to `path`; source says what was recorded (run, step, data).

        Raises:
            ValueError: nothing was added.
        """
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

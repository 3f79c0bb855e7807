"""Hold the cache that decoding reads: keys, values and index keys, flat or in pages.

Shapes: B sequences, M KV heads, D head dim, Di index head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_kernels.arguments import check_floating, check_integer, check_same_device, check_values, readable
from msa_kernels.fp8 import DTYPE


@dataclass(frozen=True, slots=True)
class DecodeCache:
    """Hold keys, values and index keys of B sequences, the new token's included.

    Flat: sequence b has row b of each tensor. Paged: token t of sequence b lies in page
    `page_table[b, t // page_size]`, at t % page_size. A page holds whole blocks.

    Example (blocks of 128 tokens, pages of 256, page_table [[5, 0, 2]]): block 3 of sequence 0 is tokens 384
    to 511, which lie in page page_table[0, 384 // 256] = 0, at places 128 to 255.
    """

    k: Tensor
    """[num_pages, page_size, M, D]; flat: [B, capacity, M, D]."""
    v: Tensor
    """Like k."""
    k_index: Tensor
    """[num_pages, page_size, Di]; flat: [B, capacity, Di]. float8_e4m3fn with a scale, see `fp8.py`."""
    page_table: Tensor | None = None
    """[B, pages per sequence] int32; pages past a sequence's length are not read. None: flat."""
    k_index_scale: Tensor | None = None
    """[num_pages, page_size] fp32; flat: [B, capacity]. Factor of each token's fp8 index key."""

    @property
    def page_size(self) -> int:
        """Return the tokens of one page, or the capacity of a flat cache."""
        return self.k.shape[1]

    @property
    def num_sequences(self) -> int:
        """Count the sequences, B, by the page table where there is one."""
        return self.k.shape[0] if self.page_table is None else self.page_table.shape[0]

    @property
    def capacity(self) -> int:
        """Return the most tokens that a sequence may have."""
        return self.page_size if self.page_table is None else self.page_table.shape[1] * self.page_size

    @property
    def has_fp8_keys(self) -> bool:
        """Tell whether index keys are kept in 8 bits."""
        return self.k_index.dtype == DTYPE

    def index_keys(self, page: int, tokens: slice, dtype: torch.dtype) -> Tensor:
        """Read index keys of some tokens of a page, [n, Di] in `dtype`, scale included."""
        keys = self.k_index[page, tokens].to(dtype)
        return keys if self.k_index_scale is None else keys * self.k_index_scale[page, tokens, None].to(dtype)

    def pages(self, sequence: int, length: int) -> list[int]:
        """List the pages that hold a sequence's first `length` tokens; waits for a page table on a device.

        Example (pages of 256 tokens, page_table [[5, 0, 2]]): 300 tokens lie in [5, 0].
        """
        if self.page_table is None:
            return [sequence]
        return self.page_table[sequence, : -(-length // self.page_size)].tolist()

    def check(self, block_size: int) -> None:
        """Raise ValueError where shapes, dtypes, devices or sizes do not fit together."""
        shapes = f"k.shape={tuple(self.k.shape)}, k_index.shape={tuple(self.k_index.shape)}"
        if self.k.dim() != 4 or self.k_index.dim() != 3 or self.k.shape[:2] != self.k_index.shape[:2]:
            raise ValueError(f"{shapes}: must be [num_pages, page_size, M, D] and [num_pages, page_size, Di]")
        if self.v.shape != self.k.shape or self.v.dtype != self.k.dtype:
            raise ValueError(
                f"v.shape={tuple(self.v.shape)}, v.dtype={self.v.dtype}: must be those of k, "
                f"{tuple(self.k.shape)}, {self.k.dtype}"
            )
        if 0 in self.k.shape[1:] or self.k_index.shape[2] == 0:
            raise ValueError(f"{shapes}: all sizes but the first must be at least 1")
        check_floating(k=self.k, v=self.v, k_index=self.k_index)
        check_same_device(k=self.k, v=self.v, k_index=self.k_index, page_table=self.page_table)
        self._check_scale()
        if self.page_table is None:
            return
        if self.page_table.dim() != 2:
            raise ValueError(
                f"page_table.shape={tuple(self.page_table.shape)}: must be [B, pages per sequence]"
            )
        check_integer(page_table=self.page_table)
        if self.page_size % block_size:
            raise ValueError(f"page_size={self.page_size}: must be a multiple of block_size={block_size}")

    def _check_scale(self) -> None:
        """Raise ValueError unless 8-bit index keys, and no others, come with a scale per token."""
        scale = self.k_index_scale
        if self.k_index.element_size() == 1 and not self.has_fp8_keys:
            raise ValueError(f"k_index.dtype={self.k_index.dtype}: 8-bit index keys must be {DTYPE}")
        if not self.has_fp8_keys:
            if scale is not None:
                raise ValueError(f"k_index_scale: must be None with k_index.dtype={self.k_index.dtype}")
            return
        if scale is None:
            raise ValueError(f"k_index_scale=None: must be there with {DTYPE}; see quantize_index_keys")
        check_same_device(k=self.k, k_index_scale=scale)
        if scale.shape != self.k_index.shape[:2] or scale.dtype != torch.float32:
            raise ValueError(
                f"k_index_scale.shape={tuple(scale.shape)}, dtype={scale.dtype}: must be "
                f"[num_pages, page_size] = {list(self.k_index.shape[:2])}, torch.float32"
            )

    def check_lengths(self, seq_lens: Tensor) -> None:
        """Raise ValueError on a length past the capacity, or a page that is read and not there.

        Tensors on a device are looked at only where MSA_KERNELS_CHECK=1: one has to wait for their values.
        """
        rule = f"from 0 to the cache's capacity of {self.capacity} tokens"
        check_values("seq_lens", seq_lens, 0, self.capacity, rule)
        if self.page_table is None or not (readable(seq_lens) and readable(self.page_table)):
            return
        number = torch.arange(self.page_table.shape[1], device=self.page_table.device)
        stop = seq_lens.to(self.page_table.device)[:, None]
        pages = self.page_table[number * self.page_size < stop]
        last = self.k.shape[0] - 1
        check_values("page_table", pages, 0, last, f"from 0 to the last page, {last}, where tokens are")

"""Read rows of a Hugging Face checkpoint's tensors, in the type that they are trained from.

Some checkpoints (the released M2 is one) keep weights as 8-bit floats with one fp32 scale per block of, say,
128 x 128: weight [R, C] F8_E4M3 and weight_scale_inv [ceil(R / 128), ceil(C / 128)], as DeepSeek-V3 (arXiv
2412.19437, section 3.3) stores them. Despite its name the scale is a factor: number = 8-bit float * scale.
These become bf16. E4M3 (arXiv 2209.05433) has 4 bits of exponent and 3 of mantissa, at most 448, so a block's
largest number decides the scale and the others keep 3 bits. Scales add 4 bytes per 16,384 numbers.
"""

from pathlib import Path

import torch
from torch import Tensor

from msa_train.convert.safetensors_files import DTYPES, RowReader, read_index
from msa_train.convert.safetensors_header import Entry

SCALE_SUFFIX = "_scale_inv"
_FP8 = "F8_E4M3"


class StoredWeights:
    """Read the tensors of a checkpoint folder; at most two files are open, for weights and scales.

    Args:
        folder: with safetensors files.
        fp8_block: rows and columns of a block of 8-bit weights; None where there are none.

    Attributes:
        entries: tensors in the files by name.

    Raises:
        ValueError: as `read_index`.
    """

    def __init__(self, folder: Path, fp8_block: tuple[int, int] | None) -> None:
        self.entries: dict[str, Entry] = read_index(folder)
        self._block, self._rows, self._scales = fp8_block, RowReader(), RowReader()

    def dtype(self, name: str) -> torch.dtype:
        """Return the type that `read_into` gives: bf16 for 8-bit weights, else that of the file.

        Raises:
            ValueError: one line, for a type that cannot be trained, or 8-bit weights without a fitting scale.
        """
        entry = self.entries[name]
        if entry.dtype in DTYPES:
            return DTYPES[entry.dtype]
        if entry.dtype != _FP8 or self._block is None:
            raise ValueError(
                f"tensor {name}: has dtype {entry.dtype}, which cannot be trained; use one of "
                f"{', '.join(DTYPES)}"
            )
        scale = self.entries.get(name + SCALE_SUFFIX)
        # the last block of rows or columns may be cut short: 300 rows in blocks of 128 have 3 scales
        wanted = tuple(-(-size // block) for size, block in zip(entry.shape, self._block, strict=True))
        if scale is None or scale.dtype != "F32" or scale.shape != wanted:
            found = "no scale" if scale is None else f"a scale {scale.dtype} {list(scale.shape)}"
            raise ValueError(
                f"tensor {name}: has {found}, should have {name}{SCALE_SUFFIX} F32 {list(wanted)} for its "
                "8-bit weights; fetch all files again"
            )
        return torch.bfloat16

    def scales(self) -> set[str]:
        """Return the names of the tensors that are scales of others."""
        fp8 = {name + SCALE_SUFFIX for name, entry in self.entries.items() if entry.dtype == _FP8}
        return fp8 & set(self.entries)

    def read_into(self, name: str, row: int, out: Tensor) -> None:
        """Fill `out`, [rows, ...] of `dtype(name)` and contiguous, with rows from `row` on.

        8-bit weights take 13 bytes per number on the way: as stored (1), as fp32, their scales, the product
        (4 each).
        """
        entry = self.entries[name]
        if entry.dtype in DTYPES:
            self._rows.read_into(entry, row, out)
            return
        assert self._block is not None, "checked by dtype"
        weights = torch.empty(out.shape, dtype=torch.float8_e4m3fn)
        self._rows.read_into(entry, row, weights)
        # blocks of rows that the wanted rows touch; the first one may begin before `row`
        first, last = row // self._block[0], (row + len(out) - 1) // self._block[0]
        scale_entry = self.entries[name + SCALE_SUFFIX]
        scale = torch.empty(last - first + 1, scale_entry.shape[1])
        self._scales.read_into(scale_entry, first, scale)
        out.copy_(dequantize(weights, scale, self._block, row - first * self._block[0]))

    def close(self) -> None:
        """Close the files that are open."""
        self._rows.close()
        self._scales.close()


def dequantize(weights: Tensor, scale: Tensor, block: tuple[int, int], offset: int) -> Tensor:
    """Multiply 8-bit weights by the scale of their block.

    Args:
        weights: [R, C] float8_e4m3fn.
        scale: [blocks of rows, blocks of columns] fp32; the first one is that of the first row's block.
        block: rows and columns of a block.
        offset: of the first row in its block.

    Returns:
        [R, C] fp32.

    Example: block (2, 2), offset 1, R = 3: rows 0, 1 and 2 have the scales of rows of blocks 0, 1 and 1. With
    scales [[10, 100], [1, 0.5]]: [[1, 2, 3], [4, 5, 6], [7, 8, 9]] -> [[10, 20, 300], [4, 5, 3], [7, 8,
    4.5]].
    """
    rows = (torch.arange(len(weights)) + offset) // block[0]
    columns = torch.arange(weights.shape[1]) // block[1]
    return weights.float() * scale[rows][:, columns]

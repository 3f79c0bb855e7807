"""What an import looks for in the numbers: a download that broke off, and weights that diverged."""

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msa_train.config.text import excerpt
from msa_train.model.hf_names import Span

_NAMED = 4
_PIECE_BYTES = 4 * 2**20


@dataclass(slots=True)
class ContentCheck:
    """Looks at every row once, when it is in memory anyway: one pass, no second reading.

    Args:
        shapes: of the tensors by Hugging Face name.
        allow_zeros: keep matrices that are zeros all over, of which a broken download leaves many.
    """

    shapes: dict[str, tuple[int, ...]]
    allow_zeros: bool = False
    _rows: Counter[str] = field(default_factory=Counter)
    _zeros: Counter[str] = field(default_factory=Counter)

    def add(self, span: Span, rows: Tensor) -> None:
        """Check rows of a tensor.

        Args:
            span: which ones.
            rows: [num_rows, C] or, of a vector, [num_rows].

        Raises:
            ValueError: one line, for numbers that are not finite, and for a matrix that is zeros all over.
        """
        is_matrix = rows.dim() > 1
        # a few rows at a time: a copy of a whole box would double what an import takes
        step = max(1, _PIECE_BYTES // (rows[0].nbytes or 1)) if is_matrix else len(rows)
        parts = (part.abs() for part in rows.split(step))
        largest = torch.cat([part.amax(-1) if is_matrix else part for part in parts])
        finite = torch.isfinite(largest)
        if not bool(finite.all()):
            row = span.name_row + int(finite.int().argmin())
            raise ValueError(
                f"tensor {excerpt(span.name)}: row {row} holds numbers that are not finite; such weights "
                "cannot be trained, fetch the file again or use another checkpoint"
            )
        if not is_matrix:
            return
        self._rows[span.name] += len(rows)
        self._zeros[span.name] += int((largest == 0).sum())
        total = math.prod(self.shapes[span.name][:-1])
        if self._rows[span.name] == self._zeros[span.name] == total and not self.allow_zeros:
            raise ValueError(
                f"tensor {excerpt(span.name)}: is zeros all over, as after a download that broke off; fetch "
                "its file again, or --allow-zeros if it should be"
            )

    def warnings(self) -> list[str]:
        """Matrices with rows of zeros, such as tokens that do not exist, or the end of a broken download."""
        found = [(name, count) for name, count in self._zeros.items() if count]
        lines = [
            f"tensor {excerpt(name)}: {count:,} of {self._rows[name]:,} rows are zeros"
            for name, count in found[:_NAMED]
        ]
        if len(found) > _NAMED:
            lines.append(f"{len(found) - _NAMED} more tensors have rows of zeros")
        return lines


def dtype_warning(config: dict[str, Any], dtypes: Collection[torch.dtype]) -> str | None:
    """Where config.json names another type of weights than all that are stored.

    Args:
        config: its content.
        dtypes: that the weights are read in.
    """
    stored = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    for part in (config.get("text_config"), config):
        for name in ("dtype", "torch_dtype"):
            given = part.get(name) if isinstance(part, dict) else None
            if isinstance(given, str) and given not in ("auto", *stored):
                return (
                    f"config.json says {name}={excerpt(given)}, the weights are "
                    f"{' and '.join(sorted(stored))}; is it the config.json of these files?"
                )
    return None

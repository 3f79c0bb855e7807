"""Describe which rows of packed queries see which rows of packed keys: what one call of a kernel computes.

Shapes: N pairs of a query span and a key span, one after another in their tensors.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


def pairs(cu_q: Sequence[int], cu_k: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield rows of queries and keys of each pair.

    Example: [0, 2, 5], [0, 4, 6] -> rows 0..2 with 0..4, rows 2..5 with 4..6.
    """
    for i in range(len(cu_q) - 1):
        yield slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])


def longest(cu_seqlens: Sequence[int]) -> int:
    """Return the most rows of a span: [0, 2, 5] -> 3."""
    return max(b - a for a, b in pairwise(cu_seqlens))


def on_device(cu_seqlens: Sequence[int], device: torch.device) -> Tensor:
    """Bring span limits to a device: [N + 1] int32; layers of one pack ask for the same ones again."""
    return _on_device(tuple(cu_seqlens), device)


@lru_cache(maxsize=64)
def _on_device(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    host = torch.tensor(cu_seqlens, dtype=torch.int32)
    if device.type != "cuda":
        return host.to(device)
    # pinned, so that the host does not wait for the device
    return host.pin_memory().to(device, non_blocking=True)

"""Whether a computation gives the same bits twice, whatever lies in the memory that it gets."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def soil(device: torch.device, num_values: int) -> None:
    """Leave NaN in the memory that the next tensors are given, where a GPU does not clear it."""
    large = torch.full((num_values,), float("nan"), device=device)
    # torch keeps small pieces apart
    small = [torch.full((2**12,), float("nan"), device=device) for _ in range(256)]
    del large, small


def differing(call: Callable[[], Sequence[Tensor]]) -> list[int]:
    """Which of the results, by place, are not the same when it is called again; NaN never is."""
    first = [tensor.clone() for tensor in call()]
    device = first[0].device
    soil(device, 2**28 if torch.version.cuda else 2**10)
    return [place for place, pair in enumerate(zip(first, call(), strict=True)) if not torch.equal(*pair)]

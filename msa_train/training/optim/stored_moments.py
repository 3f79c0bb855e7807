"""Give checkpoints moments as they store them: as they are, or in fp32 where they are codes and scales.

Nothing is copied before the save copies it: fp8 becomes fp32 in the host's buffer, 64 MiB at a time.
"""

import torch
from torch import Tensor

from msa_train.checkpoint.torch_dist.staging import deferred
from msa_train.config.optimizer_bytes import FP8_BLOCK
from msa_train.training.optim.block_scaled import BlockScaled


def has_place(kept: Tensor) -> bool:
    """Tell whether a tensor can be stored from and read into where it is; fp8 that looks like fp32 cannot."""
    return not isinstance(kept, BlockScaled)


def stored(kept: Tensor, *, loading: bool) -> Tensor:
    """Return what is stored or read into in the place of a moment, or of a weight.

    Args:
        kept: by the optimizer, of any dtype.
        loading: to be read into, and then copied to `kept` where it has no place.

    Returns:
        The tensor itself; of fp8 memory of the host, or a stand-in that gets values when it is copied.
    """
    if not isinstance(kept, BlockScaled):
        return kept.detach()
    if loading:
        return torch.empty(kept.shape)
    count = kept.numel()

    def read(begin: int, end: int) -> Tensor:
        first, stop = begin - begin % FP8_BLOCK, min(-(-end // FP8_BLOCK) * FP8_BLOCK, count)
        return kept.part(first, stop).read()[begin - first : end - first]

    return deferred(tuple(kept.shape), torch.float32, read)

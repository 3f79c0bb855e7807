"""Pack marks of KV blocks into bits, count them, and find the marked ones without waiting for a device.

Shapes: NP KV blocks of a rank, W = ceil(NP / 8) bytes of a bitmap of them.
"""

import torch
from torch import Tensor


def pack_bits(wanted: Tensor) -> Tensor:
    """Pack marks into bytes: [..., NP] bool -> [..., W] uint8, the first KV block in the lowest bit.

    Example: True at 0, 2 and 8 of 9 -> [5, 1].
    """
    padded = torch.nn.functional.pad(wanted, (0, -wanted.shape[-1] % 8))
    # Made on the device: a tensor from a list would make the host wait for it.
    shifts = torch.arange(8, dtype=torch.uint8, device=wanted.device)
    weights = torch.ones_like(shifts) << shifts
    return (padded.view(*wanted.shape[:-1], -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, num_kv_blocks: int) -> Tensor:
    """Unpack bytes into marks: [..., W] uint8 -> [..., NP] bool; [5, 1], 9 -> True at 0, 2 and 8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).bool().flatten(-2)[..., :num_kv_blocks]


def nonzero_of(mask: Tensor, count: int) -> Tensor:
    """Find the flat positions [count] int64 of the `count` true entries, ascending; no copy to the host.

    Example: [[False, True], [True, False]], 2 -> [1, 2].
    """
    flat = mask.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, count)
    # One place more than there are: what is false writes there.
    found = torch.empty(count + 1, dtype=torch.int64, device=mask.device)
    return found.scatter_(0, place, torch.arange(flat.numel(), device=mask.device))[:count]


def count_bits(bits: Tensor) -> Tensor:
    """Count the set bits of each bitmap: [..., W] uint8 -> [...] int64; [[5, 1], [0, 255]] -> [3, 8]."""
    # Sums of neighbouring bits, then of pairs of bits, then of both halves of a byte.
    x = bits - ((bits >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).sum(-1, dtype=torch.int64)

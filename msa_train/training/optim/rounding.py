"""Round fp32 values to bf16 or fp8 stochastically: up or down by chance, so that the expected value is kept.

Rounding to the nearest would stop small changes for good. A second moment in e4m3 has steps of 6 to 12%;
where no gradient comes it shrinks by 5% in each step (beta2 = 0.95), and the nearest of 0.95 x is x again.

Chance comes from a hash of the value's own bits, its place, and a salt, the number of the update: nothing is
kept in checkpoints, and replicas of a parameter on other ranks round alike. Megatron cuts parameters
elsewhere in another layout, so there the roundings are others, as the order of sums is. What is in the low
precision already is never changed.

Costs about 15 elementwise passes over fp32 values. By arithmetic, for 5B parameters of a rank of m3 on 256
ranks: 15 x 8 bytes x 5e9 / 3 TB/s = 0.2 s for each micro-batch that is added to bf16 gradients; of the 1.7B
that it updates, 0.1 s a step for both moments.
"""

import torch
from torch import Tensor

_BF16_LOW = 0xFFFF
_FP8_MAX = 448.0
# Exponents of e4m3 from which on values have 3 more bits; below they are multiples of 2^-9.
_FP8_SMALLEST_NORMAL = 2.0**-6


def to_bf16(values: Tensor, salt: int, *, first: int = 0) -> Tensor:
    """Round to bf16 stochastically.

    Example: 1 + 2^-9 lies between 1 and 1 + 2^-7, so it becomes 1 in three of four cases.

    Args:
        values: fp32, any shape, contiguous. Not finite: kept.
        salt: other numbers give other choices.
        first: place of the first value in its parameter, so that pieces round as the whole does.

    Returns:
        bf16, of the same shape.
    """
    bits = values.view(torch.int32)
    # the magnitude grows by less than one step of bf16, then what is below that step is cut off
    rounded = (
        _hash(bits, salt, first)
        .bitwise_and_(_BF16_LOW)
        .add_(bits)
        .bitwise_and_(~_BF16_LOW)
        .view(torch.float32)
    )
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def add_to_bf16(total: Tensor, addend: Tensor, *, piece: int, salt: int = 0) -> None:
    """Add in fp32 and round the sum back: total += addend.

    The first addend to zeros is taken as it is. Further ones are rounded with an expected error of zero, so
    the error of n micro-batches grows by sqrt(n) 2^-9 at most, where nearest would lose what is below 2^-9 of
    the sum altogether.

    Args:
        total: bf16, contiguous, changed in place.
        addend: of the same shape, any floating dtype.
        piece: elements that are added at a time.
        salt: for other choices.
    """
    flat, added = total.view(-1), addend.reshape(-1)
    for first in range(0, flat.numel(), piece):
        target, source = flat[first : first + piece], added[first : first + piece]
        target.copy_(to_bf16(target.float().add_(source), salt, first=first))


def to_e4m3(values: Tensor, salt: int, *, first: int, is_root: bool) -> Tensor:
    """Round to float8_e4m3fn stochastically.

    Args:
        values: fp32 of magnitude up to 448.
        salt: other numbers give other choices.
        first: place of the first value in its parameter.
        is_root: they are roots, all at least 0, and their squares are to be kept in the expected value. What
            is not 0 does not become 0 then: something is divided by it.

    Returns:
        float8_e4m3fn, of the same shape. Not finite: nan.
    """
    # 2^exponent, by clearing sign and fraction; a step is an eighth of it
    power = values.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    step = power.clamp_(min=_FP8_SMALLEST_NORMAL).mul_(0.125)
    scaled = values / step
    lower = scaled.floor()
    if is_root:
        # n^2 + p ((n + 1)^2 - n^2) = x^2
        above = scaled.square().sub_(lower.square()).div_(lower.mul(2).add_(1))
    else:
        above = scaled.sub(lower)
    # 24 bits are what fp32 can hold of a number below 1
    chance = _hash(values.view(torch.int32), salt, first).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)
    lower.add_(chance < above)
    if is_root:
        lower.masked_fill_((lower == 0) & (values > 0), 1.0)
    return lower.mul_(step).to(torch.float8_e4m3fn)


def power_of_two_scale(largest: Tensor) -> Tensor:
    """Return the smallest power of two by which `largest` is at most 448, e4m3's largest number.

    Powers of two, so that rounding what was rounded before changes nothing. At least 2^-126, fp32's smallest
    normal number.

    Args:
        largest: fp32, at least 0.
    """
    fraction, exponent = torch.frexp(largest / _FP8_MAX)
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
    # by its bits: GPUs' powers of two are not always exact
    scale = exponent.clamp_(-126, 127).add_(127).bitwise_left_shift_(23).view(torch.float32)
    return torch.where(largest.isfinite(), scale, largest)


def _hash(bits: Tensor, salt: int, first: int) -> Tensor:
    """Mix all bits of each int32, its place and the salt: the finaliser of MurmurHash3.

    Places, as elements that once are equal would otherwise round alike for as long as they get no gradient.
    """
    mixed = torch.arange(bits.numel(), dtype=torch.int32, device=bits.device).view(bits.shape)
    mixed.add_(_signed(first & 0xFFFFFFFF)).mul_(_signed(0x27D4EB2F)).add_(
        _signed((salt * 0x7F4A7C15 + 0x165667B1) & 0xFFFFFFFF)
    )
    mixed.bitwise_xor_(bits).mul_(_signed(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        # shifts of int32 repeat the sign; the mask makes them shifts of unsigned numbers
        mixed.bitwise_xor_((mixed >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_signed(factor))
    return mixed.bitwise_xor_((mixed >> 16).bitwise_and_(0xFFFF))


def _signed(number: int) -> int:
    """Return the int32 of the same bits."""
    return number - 2**32 if number >= 2**31 else number

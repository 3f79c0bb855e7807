"""Embed positions by rotating the first channels of each head, half-split (NeoX) pairing."""

import torch
from torch import Tensor

from msa_train.config import Rope, RopeType


def rotary_table(
    position: Tensor, *, rotary_dim: int, rope: Rope, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of position * frequency: [T] int -> two [T, rotary_dim / 2].

    Without scaling, frequency i is theta^(-2i / rotary_dim), see `frequencies`. With yarn, both results are
    multiplied by its attention factor.

    Angles are formed in fp64: at position 1e6 an fp32 product is off by up to 0.06 rad. Nothing is kept from
    one pack to the next, so a stage that changes the embedding changes this call alone. By arithmetic, a rank
    with 16,384 of 1M tokens and 64 rotated channels makes 4 MiB in fp32 per pack, once for all layers; no
    message, no file.
    """
    angle = position.double()[:, None] * frequencies(rope, rotary_dim, device=position.device)
    # exact where the factor is 1
    cos, sin = angle.cos() * rope.attention_factor, angle.sin() * rope.attention_factor
    return cos.to(dtype), sin.to(dtype)


def frequencies(rope: Rope, rotary_dim: int, *, device: torch.device | None = None) -> Tensor:
    """Compute the angle per position of each pair of channels: [rotary_dim / 2] fp64.

    The scaling is that of transformers 5.23, in fp64; ntk has one factor for all lengths, where its `dynamic`
    follows the length of each input.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float64) / rotary_dim
    unscaled: Tensor = rope.base(rotary_dim) ** -exponent
    if rope.type is RopeType.linear:
        return unscaled / rope.factor
    if rope.type is not RopeType.yarn:
        return unscaled
    low, high = rope.ramp(rotary_dim)
    pair = torch.arange(rotary_dim // 2, device=device, dtype=torch.float64)
    divided = ((pair - low) / (high - low)).clamp(0, 1)
    return unscaled * (1 - divided) + unscaled / rope.factor * divided


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channels (i, i + rotary_dim / 2) of x [T, ..., D]; channels from rotary_dim on stay.

    Computed in the table's dtype (at least fp32) and returned in x's.
    """
    cos, sin = (t.view(t.shape[0], *(1,) * (x.dim() - 2), t.shape[1]) for t in table)
    half = cos.shape[-1]
    a, b = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)

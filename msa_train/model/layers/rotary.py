"""Embed positions by rotating the first channels of each head, half-split (NeoX) pairing."""

import torch
from torch import Tensor


def rotary_table(
    position: Tensor, *, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of position * theta^(-2i / rotary_dim): [T] int -> two [T, rotary_dim / 2].

    Angles are formed in fp64: at position 1e6 an fp32 product is off by up to 0.06 rad.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=position.device, dtype=torch.float64) / rotary_dim
    angle = position.double()[:, None] * theta**-exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channels (i, i + rotary_dim / 2) of x [T, ..., D]; channels from rotary_dim on stay.

    Computed in the table's dtype (at least fp32) and returned in x's.
    """
    cos, sin = (t.view(t.shape[0], *(1,) * (x.dim() - 2), t.shape[1]) for t in table)
    half = cos.shape[-1]
    a, b = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)

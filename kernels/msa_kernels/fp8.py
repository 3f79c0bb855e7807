"""Keep index keys in 8 bits: half the bytes that decoding reads per cached token, and faster scores."""

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
MAX_VALUE = 448.0
# Smallest exponent of a normal fp32 number
_MIN_EXPONENT = -126


def quantize_index_keys(k_index: Tensor) -> tuple[Tensor, Tensor]:
    """Round index keys, or queries, to float8_e4m3fn with one power of two for each, as `DecodeCache` has.

    The scale is the least power of two that brings the token's largest channel to at most 448. Multiplying by
    it rounds nothing, so that all error is the 4 significant bits of a channel: at most 1/16 of it, and less
    than 2^-17 of the token's largest channel where it is small.

    Example: a token with channels (3, -500) gets scale 2 and (1.5, -256): 250 lies between 240 and 256.

    Args:
        k_index: [..., Di], any float dtype, finite.

    Returns:
        keys [..., Di] float8_e4m3fn and scale [...] fp32; k_index is nearly keys * scale.
    """
    values = k_index.float()
    # mantissa from 1/2 to 1: only of a power of two is it 1/2
    mantissa, exponent = torch.frexp(values.abs().amax(-1) / MAX_VALUE)
    exponent = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(min=_MIN_EXPONENT)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent)
    return (values / scale.unsqueeze(-1)).to(DTYPE), scale

"""Take logarithms in Triton kernels by the GPU's own instruction. Imports Triton.

`tl.log2` is some 20 instructions for each value, as exact as fp32 can hold. The GPU's own is one, as
`tl.exp2` is already, and wrong by at most 2^-22 (PTX ISA, lg2.approx).
"""

import os

import triton
import triton.language as tl

# Triton's interpreter runs no assembly.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def log2_approx(b_x):
    """Take log2 of every value of a tile, fp32, not negative; of values below 2^-126, 0 included, -126."""
    b_x = tl.maximum(b_x, _SMALLEST)
    if _INTERPRETED:
        return tl.log2(b_x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )

"""Multiply matrices of 16 bits with results of 32: sums inside a product are not rounded on their way out.

CUDA's matrix product can write fp32 from bf16 operands; torch offers that as `out_dtype` from 2.8 on, on CUDA
alone. Elsewhere sums are formed from operands brought to fp32, exact as well and, where the processor
multiplies bf16 faster, slower.
"""

from functools import cache

import torch
from torch import Tensor


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply left [n, k] @ right [k, m] -> [n, m] of `dtype`, from operands of at most that width.

    On CUDA 16-bit operands give unrounded fp32; on other devices a product of theirs has been rounded to 16
    bits once.
    """
    if left.dtype != dtype and _has_wide_output(left):
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left [n, k] @ right [k, m] to total [n, m], of the operands' dtype or wider, in place.

    Beside it CUDA makes one more [n, m]; elsewhere 16-bit operands are copied to the wider dtype first,
    4 * (n * k + k * m) bytes. Callers keep n and m small: in `cross_entropy` it is 192 MiB at most.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _has_wide_output(left):
        total.copy_(torch.addmm(total, left, right, out_dtype=total.dtype))
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _has_wide_output(operand: Tensor) -> bool:
    """Tell whether products of such operands can come out in fp32."""
    half = operand.dtype in (torch.bfloat16, torch.float16)
    return half and operand.device.type == "cuda" and _can_ask(operand.device, operand.dtype)


@cache
def _can_ask(device: torch.device, dtype: torch.dtype) -> bool:
    """Try once: not every build of torch for GPUs has it."""
    one = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (NotImplementedError, RuntimeError):
        return False

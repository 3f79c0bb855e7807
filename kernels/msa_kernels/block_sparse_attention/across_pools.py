"""Bring together what pools share: merge their outputs, form what each backward needs of the other pools.

That is one number a row: ds = p * (dout . v - delta), with delta = dout . out of the merged output, as
tiled_backward.py derives.
"""

import importlib

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.types import PoolOutput
from msa_kernels.dispatch import choose_kernel, dtypes_not_in_triton
from msa_kernels.full_attention.op import merge_parts

# Values in the compute dtype at a time, 32 MiB in fp32, where torch has to widen them first.
_VALUES_AT_A_TIME = 2**23


def output_delta(dout: Tensor, out: Tensor, *, kernel: str = "auto") -> Tensor:
    """Sum dout * out over the last dim, without a copy of either in the dtype of the sums.

    Of 1M tokens on 64 ranks (M3: 64 heads of 128 channels) such copies would be 512 MiB each and layer.

    Args:
        dout: [T, M, G, D] gradient of the output. out: [T, M, G, D] the output, merged over pools.
        kernel: as in `pool_forward`.

    Returns:
        [T, M, G] fp32, or fp64 where out is.

    Raises:
        ValueError: as in `pool_forward`.
    """
    unsupported = None
    if dtypes := dtypes_not_in_triton([dout, out]):
        unsupported = f"dtype={dtypes}: output and gradient must both be bfloat16, float16 or float32"
    if choose_kernel(kernel, out.device, unsupported) == "triton":
        triton = importlib.import_module("msa_kernels.block_sparse_attention.triton")
        return triton.output_delta(dout, out)
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    delta = torch.empty(out.shape[:-1], dtype=dtype, device=out.device)
    step = max(1, _VALUES_AT_A_TIME // max(1, out[0].numel())) if out.shape[0] else 1
    for begin in range(0, out.shape[0], step):
        rows = slice(begin, begin + step)
        torch.sum(dout[rows].to(dtype) * out[rows], -1, out=delta[rows])
    return delta


def merge_outputs(a: PoolOutput, b: PoolOutput) -> PoolOutput:
    """Merge two results of the same queries: lse = log(e^lse1 + e^lse2), outputs in shares of e^lse."""
    out, lse = merge_parts(a.out, a.lse, b.out, b.lse)
    return PoolOutput(
        out=out,
        lse=lse,
        lse_index=_logaddexp(a.lse_index, b.lse_index),
        lse_teacher=_logaddexp(a.lse_teacher, b.lse_teacher),
    )


def _logaddexp(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.logaddexp(a, b)

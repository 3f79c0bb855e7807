"""Sum dout * out over the channels: all that the backward of one pool needs of the others.

ds = p * (dout . v - delta) with delta = dout . out of the merged output; tiled_backward.py derives it.
"""

import importlib

import torch
from torch import Tensor

from msa_kernels.dispatch import choose_kernel, dtypes_not_in_triton

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

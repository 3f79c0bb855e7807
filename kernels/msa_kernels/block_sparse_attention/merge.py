"""Merge attention over two disjoint pools to that over both."""

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.types import PoolOutput
from msa_kernels.full_attention.op import merge_parts


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

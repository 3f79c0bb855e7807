"""Attention over a pool by Triton kernels: what it serves, forward and backward. Imports Triton."""

import torch
import triton
from torch import Tensor

from msa_kernels.block_sparse_attention import configs
from msa_kernels.block_sparse_attention.launch import forward
from msa_kernels.block_sparse_attention.launch_backward import backward

__all__ = ["backward", "forward", "why_not"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(q: Tensor, kv: Tensor, q_index: Tensor | None, k_index: Tensor | None) -> str:
    """Why the kernels cannot serve a call with these tensors; empty where they can."""
    tensors = [tensor for tensor in (q, kv, q_index, k_index) if tensor is not None]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or q.dtype not in _DTYPES:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"dtype={names}: q, K/V and index tensors must all be bfloat16, float16 or float32"
    devices = {tensor.device.type for tensor in tensors}
    if devices != {"cuda"} and not (devices == {"cpu"} and triton.knobs.runtime.interpret):
        return f"device={', '.join(sorted(devices))}: needs a CUDA device"
    index_dim = 0 if q_index is None else q_index.shape[-1]
    return configs.why_not(q.shape[-1], kv.shape[2], index_dim, q.element_size())

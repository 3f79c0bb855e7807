"""Choose what attends to a pool: Triton kernels, the tiled torch path, or the plain definition."""

import importlib
from types import ModuleType

from torch import Tensor

from msa_kernels.block_sparse_attention import configs
from msa_kernels.dispatch import choose_kernel, dtypes_not_in_triton

_MODULES = {
    "triton": "msa_kernels.block_sparse_attention.triton",
    "reference": "msa_kernels.block_sparse_attention.tiled_reference",
}


def implementation(
    kernel: str, q: Tensor, kv: Tensor, q_index: Tensor | None, k_index: Tensor | None
) -> ModuleType | None:
    """Return the module with `forward` and `backward` for this call, or None for the tiled path in tiled.py.

    Triton is imported only where it is taken.

    Args:
        kernel: "auto", "triton", "cpu" or "reference", see `dispatch.choose_kernel`.
        q, kv, q_index, k_index: tensors of the call.

    Raises:
        ValueError: on another name, and where "triton" cannot serve the call.
    """
    chosen = choose_kernel(kernel, q.device, unsupported(q, kv, q_index, k_index))
    return None if chosen == "cpu" else importlib.import_module(_MODULES[chosen])


def unsupported(q: Tensor, kv: Tensor, q_index: Tensor | None, k_index: Tensor | None) -> str | None:
    """Return why there are no Triton kernels for these tensors; None where there are."""
    # products on tensor cores take two operands of one dtype
    tensors = [tensor for tensor in (q, kv, q_index, k_index) if tensor is not None]
    if dtypes := dtypes_not_in_triton(tensors):
        return f"dtype={dtypes}: q, K/V and index tensors must all be bfloat16, float16 or float32"
    index_dim = 0 if q_index is None else q_index.shape[-1]
    return configs.why_not(q.shape[-1], kv.shape[2], index_dim, q.shape[2], q.element_size())

"""Which implementation attends over a pool: Triton kernels, the tiled torch path, or the plain definition."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

from torch import Tensor

KERNELS = ("auto", "triton", "cpu", "reference")


def implementation(
    kernel: str, q: Tensor, kv: Tensor, q_index: Tensor | None, k_index: Tensor | None
) -> ModuleType | None:
    """Module with `forward` and `backward` for this call, or None for the tiled path in pool.py.

    `auto` takes Triton for tensors on a CUDA device where Triton is installed and has a configuration for
    their sizes, otherwise the tiled path. Triton is imported only where it is taken.

    Args:
        kernel: "auto", "triton", "cpu" or "reference".
        q, kv, q_index, k_index: tensors of the call.

    Raises:
        ValueError: on another name, and where "triton" cannot serve the call.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: must be one of {', '.join(KERNELS)}")
    if kernel == "reference":
        return importlib.import_module("msa_kernels.block_sparse_attention.pool_reference")
    if kernel == "cpu" or (kernel == "auto" and not q.is_cuda):
        return None
    if not _has_triton():
        if kernel == "auto":
            return None
        raise ValueError("kernel='triton': Triton is not installed; install it or use kernel='cpu'")
    launch = importlib.import_module("msa_kernels.block_sparse_attention.triton_path")
    why_not = launch.why_not(q, kv, q_index, k_index)
    if not why_not:
        return launch
    if kernel == "auto":
        return None
    raise ValueError(f"kernel='triton': {why_not}; use kernel='cpu'")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None

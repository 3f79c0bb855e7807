"""Choose which of its implementations an operator runs."""

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

KERNELS = ("auto", "triton", "cpu", "reference")
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def choose_kernel(kernel: str, device: torch.device, unsupported: str | None) -> str:
    """Choose the implementation to run: "triton", "cpu" or "reference".

    Args:
        kernel: one of KERNELS. "auto": Triton on a GPU if it is installed and has a kernel for the arguments,
            otherwise "cpu", the tiled operator in torch, which runs on every device.
        device: of the arguments.
        unsupported: why Triton has no kernel for the arguments, as text for an error; None: it has.

    Raises:
        ValueError: on an unknown name, and where "triton" is asked for and cannot run.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel}: must be one of {', '.join(KERNELS)}")
    if kernel == "auto":
        return "triton" if device.type == "cuda" and has_triton() and unsupported is None else "cpu"
    if kernel == "triton":
        if not has_triton():
            raise ValueError("kernel=triton: triton is not installed; install it, or take kernel=auto")
        # the interpreter of Triton computes on the CPU, for tests
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"kernel=triton: runs on GPUs, not on device={device}; take kernel=auto")
        if unsupported is not None:
            raise ValueError(f"kernel=triton: {unsupported}; take kernel=auto")
    return kernel


def dtypes_not_in_triton(tensors: Sequence[Tensor]) -> str:
    """Name the dtypes, where they are not one that Triton kernels take; empty where they are."""
    dtypes = {tensor.dtype for tensor in tensors}
    # two operands of a product must be of one dtype
    if len(dtypes) == 1 and dtypes <= set(_TRITON_DTYPES):
        return ""
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


@cache
def has_triton() -> bool:
    """Find out whether triton can be imported, without importing it."""
    return find_spec("triton") is not None

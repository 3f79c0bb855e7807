"""Launch Triton kernels as operators of torch, so that whatever watches operators sees launches too.

Each kernel is an operator `msa_kernels::NAME(Tensor(a!)[] tensors) -> ()`, made at its first launch. Tensors
without memory (fake and meta ones) pass through and nothing runs: a step can be traced, and the scratch of
the launches, which torch allocates outside of them, is counted as it is. Profilers list kernels by name.

Costs some 10 us of the host a launch, beside 20 to 50 us of Triton's own.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("msa_kernels", "DEF")
_next = threading.local()


class Launched:
    """Stand for a kernel: `Launched(kernel)[grid](...)` launches it as `kernel[grid](...)` does."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            # a descriptor stands for the tensor that it describes
            tensors = [getattr(argument, "base", argument) for argument in arguments]
            _next.call = lambda: self.kernel[grid](*arguments, **constants)
            try:
                _operator(_name(self.kernel))([one for one in tensors if isinstance(one, Tensor)])
            finally:
                _next.call = None

        return launch


def _name(kernel: Any) -> str:
    # what Triton's interpreter makes of a kernel holds the function too
    return kernel.fn.__name__


@cache
def _operator(name: str) -> Callable[[list[Tensor]], None]:
    """Make the operator of a kernel."""
    _library.define(f"{name}(Tensor(a!)[] tensors) -> ()")

    def run(tensors: list[Tensor]) -> None:
        _next.call()

    def pass_through(tensors: list[Tensor]) -> None:
        pass

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"msa_kernels::{name}", pass_through, lib=_library)
    return getattr(torch.ops.msa_kernels, name).default

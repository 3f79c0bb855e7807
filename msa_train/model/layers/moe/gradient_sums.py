"""Add up weight gradients of tiles: in fp32, in the engine's gradient buffer where that is fp32 or fp64."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GradientSums:
    """Add up gradients of parameters over tiles in fp32 (fp64 for fp64), and hand them back once.

    Both engines keep a buffer `main_grad` for each parameter, and a mark `grad_added_to_main_grad` by which
    their hooks know that nothing is to be added: there sums need no memory of their own. Elsewhere they take
    4 bytes for each element, in M3 432 MiB for 2 experts.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: dict[int, Tensor] = {}

    def add(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Add a gradient, shaped like the parameter."""
        if id(parameter) not in self._sums:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            own = _main_grad(parameter, dtype)
            self._sums[id(parameter)] = torch.zeros_like(parameter, dtype=dtype) if own is None else own
        self._sums[id(parameter)] += grad

    def take(self) -> list[Tensor | None]:
        """Return what a backward function returns for the parameters, in their order."""
        return [self._taken(parameter) for parameter in self._parameters]

    def _taken(self, parameter: nn.Parameter) -> Tensor | None:
        found = self._sums.pop(id(parameter), None)
        if found is None:
            return None
        if _main_grad(parameter, found.dtype) is None:
            return found
        parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        # Hooks of the engines want to see a gradient; one number stands for all.
        return parameter.new_zeros(()).expand_as(parameter)


def _main_grad(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor | None:
    """Return the engine's gradient buffer of a parameter, if it is one to add into in this dtype."""
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    buffer: Tensor | None = getattr(parameter, "main_grad", None)
    return buffer if buffer is not None and buffer.dtype == dtype else None


def learning(module: nn.Module | None) -> list[nn.Parameter]:
    """List the parameters of a module that learn."""
    return [] if module is None else [p for p in module.parameters() if p.requires_grad]

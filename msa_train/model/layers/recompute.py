"""Compute parts of a layer again in the backward pass, with the decisions of the forward pass.

Two ways. A *unit*, as attention or the experts, keeps its inputs alone and runs again, from the record of the
layer's call: its block selection, its exchange and its routing are replayed and nothing is counted twice. A
*norm* keeps its input, which the residual stream keeps anyway; whoever saved its output gets it formed anew.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from msa_train.model.inputs.pack_params import SelectionRecord
from msa_train.model.layers.norm import RMSNorm
from msa_train.model.layers.offload import OffloadedLayer, storage_of


def run_recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call function(*args), and again in the backward pass, with gradients for tensors among args."""
    # Stopping early would skip collectives on ranks that need fewer tensors.
    with set_checkpoint_early_stop(False):
        # No dropout, so there is no random state to bring back.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def run_unit(function: Callable[..., Any], record: SelectionRecord, *args: Any) -> Any:
    """Run a part of a layer that is recomputed by itself; the second time `record` says so.

    In the backward pass no part of the layer runs for the first time, so one mark serves all parts.
    """
    has_run = False

    def run(*inputs: Any) -> Any:
        nonlocal has_run
        if has_run:
            record.calls = max(record.calls, 2)
        has_run = True
        return function(*inputs)

    return run_recomputed(run, *args)


class KeptTensors:
    """Decide how each tensor that a layer's forward pass saves is kept: as it is, on the host, or as a norm.

    A context around the layer's forward pass. Tensors saved inside a unit never come here, its inputs do.
    """

    def __init__(self, offload: OffloadedLayer | None) -> None:
        """offload: takes in what is large; None: all stays on the device."""
        self._offload = offload
        # The outputs are held to the end of the layer, so that no other tensor can take their memory.
        self._norms: dict[int, tuple[Tensor, _NormOutput]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def __enter__(self) -> "KeptTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._norms.clear()
        if self._offload is not None:
            self._offload.end()

    def run_norm(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """Normalise x, and keep the output for nobody."""
        out = run_recomputed(norm.normalise, x)
        self._norms[storage_of(out)] = (out, _NormOutput(norm, x.detach(), self))
        return out

    def pack(self, tensor: Tensor) -> Any:
        """See torch.autograd.graph.saved_tensors_hooks."""
        entry = self._norms.get(storage_of(tensor)) if self._norms else None
        if entry is not None:
            return entry[1].view_like(tensor)
        return tensor if self._offload is None else self._offload.pack(tensor)

    def unpack(self, packed: Any) -> Tensor:
        """See torch.autograd.graph.saved_tensors_hooks."""
        if isinstance(packed, _NormView):
            return packed.restore()
        return packed if self._offload is None else self._offload.unpack(packed)


class _NormOutput:
    """Form the output of a norm again, once for all who saved it."""

    def __init__(self, norm: RMSNorm, x: Tensor, kept: KeptTensors) -> None:
        self._norm, self._kept = norm, kept
        self._input = kept.pack(x)
        self._users = 0
        self._output: Tensor | None = None

    def view_like(self, tensor: Tensor) -> "_NormView":
        """Stand for a view of the output."""
        self._users += 1
        return _NormView(self, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def take(self) -> Tensor:
        """Return the output, kept until the last user has it."""
        output = self._output
        if output is None:
            with torch.no_grad():
                output = self._norm.normalise(self._kept.unpack(self._input))
        self._users -= 1
        self._output = output if self._users > 0 else None
        return output


class _NormView:
    """Stand for a saved tensor that is (a view of) a norm's output."""

    def __init__(self, output: _NormOutput, shape: torch.Size, stride: tuple[int, ...], offset: int) -> None:
        self._output, self._place = output, (shape, stride, offset)

    def restore(self) -> Tensor:
        """Form the tensor."""
        return self._output.take().as_strided(*self._place)

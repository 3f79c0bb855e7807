"""A GPU whose tensors have shapes and no memory, for one process; the host's tensors stay real.

Inside `FakeDevice` all that is made on "cuda" is a fake tensor of torch: it has shape, dtype and device, and
operations on it make others of the right shape. Python sees a GPU, so that the code takes the branches that
it takes on one. C++ is told that it is the CPU: torch builds without CUDA have nothing that could order work
on a GPU, and autograd asks for it. What is computed on the host alone is computed in fact.

What is answered, since no number exists on the device:

    float(x), bool(x)   1.0 and True, for losses, norms and checks that all is finite
    int(x)              an error that names the line: a number that decides sizes has to be stated
    collectives         nothing travels; results are there
    kernels             operators that nothing runs for (`msa_kernels.operators`)
    torch.cuda          one idle device with streams and events that do nothing
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._library import simple_registry
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from msa_train.plan.trace.cuda_names import DEVICE, DEVICE_OF, IN_CPP, device_in_cpp, replaced_names
from msa_train.plan.trace.storage_tracker import StorageTracker, source_lines

_aten: Any = torch.ops.aten
# Host tensors above this many elements have no memory either: a checkpoint's are as large as the device's.
_REAL_ELEMENTS = 2**23


class HostReadError(RuntimeError):
    """Report that the host wants to know a number of a tensor that has none."""


_WITH_SCRATCH = (_aten.logsumexp.default,)
"operators whose own steps in C++ a fake tensor does not see"


class FakeDevice(StorageTracker):
    """Run what is inside on a fake GPU and count its memory."""

    def __init__(self, part_of: Callable[[list[str]], str]) -> None:
        super().__init__(part_of)
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = contextlib.ExitStack()
        self.selected = -1
        "how many numbers a mask selects, while that is known; -1: it is not"
        self.counts = True
        "false inside one kernel, whose steps leave nothing in memory but its results"

    def __enter__(self) -> "FakeDevice":
        self._stack.enter_context(replaced_names(answer))
        self._stack.enter_context(self._fakes)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and enter the storages of its results."""
        if func is DEVICE_OF:
            return device_in_cpp(args)
        if func in _WITH_SCRATCH and self.counts:
            # what torch makes inside, as large as the operand, is gone when the result is there
            self.enter(self.run(_aten.empty_like.default, (args[0],), {}))
        out = self.run(func, args, kwargs or {})
        if self.counts:
            self.enter(out)
        return out

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation: in fact where all of it is on the host, else on shapes."""
        if func.namespace == "c10d":
            return _collective(func, args)
        if func.namespace == "msa":
            return self._by_its_fake(func, args, kwargs)
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        device = kwargs.get("device")
        if device == IN_CPP:
            device = DEVICE
            kwargs = kwargs | {"device": device}
        on_host = device is None or torch.device(device).type == "cpu"
        if on_host and not (_has_fakes(args, kwargs) or (args and _is_large(args[0]))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return answer(args[0])
        if func is _aten.masked_select.default and self.selected >= 0:
            return args[0].new_empty(self.selected)
        if func is _aten._to_copy.default and not isinstance(args[0], FakeTensor):
            # from the host: torch would copy what it knows of it to a device that is not there
            given, dtype = args[0], kwargs.get("dtype") or args[0].dtype
            return _aten.empty_strided.default(given.shape, given.stride(), dtype=dtype, device=DEVICE)
        return func(*args, **kwargs)

    def _by_its_fake(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the fake of one of our operators with open eyes: it makes and drops the kernel's scratch."""
        found: Any = simple_registry.singleton.find(func._schema.name)
        TorchDispatchMode.__enter__(self)
        try:
            return found.fake_impl.kernel(*args, **kwargs)
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def counted(self, tensor: Tensor) -> bool:
        """Leave out real tensors of the host, and those on the device of torch that has no memory."""
        return isinstance(tensor, FakeTensor) and tensor.fake_device.type != "meta"


def _has_fakes(args: Any, kwargs: Any) -> bool:
    for value in args:
        if isinstance(value, FakeTensor):
            return True
        if isinstance(value, list | tuple) and _has_fakes(value, {}):
            return True
    return any(isinstance(value, FakeTensor) for value in kwargs.values())


def _is_large(size: Any) -> bool:
    """Tell whether this is the size of a host tensor that gets no memory."""
    if not isinstance(size, list | tuple) or not all(isinstance(n, int) for n in size):
        return False
    return math.prod(size) > _REAL_ELEMENTS


def answer(tensor: Tensor) -> float | bool | int:
    """Say what number a scalar of the device is."""
    if tensor.dtype.is_floating_point:
        return 1.0
    if tensor.dtype is torch.bool:
        return True
    if tensor.device.type == "cpu" and getattr(tensor, "constant", None) is not None:
        with unset_fake_temporarily():
            return int(tensor.constant)  # type: ignore[attr-defined]
    where = " < ".join(source_lines()[:3])
    raise HostReadError(f"{where}: the host reads an integer of the device, which a trace cannot know")


def _collective(func: Any, args: tuple[Any, ...]) -> Any:
    """Return what a collective returns, and bring nothing."""
    work = FakeWork().boxed()
    return work if len(func._schema.returns) == 1 else (args[0], work)

"""Put a fake device in the place of the names by which Python asks for a GPU, as long as a trace runs."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
# What C++ is told of the fake device. The number tells it from the host, which has none: where C++ makes
# tensors "on the device of x", this is the device that it asks for.
IN_CPP = torch.device("cpu", 0)
_META = torch.device("meta")
DEVICE_OF = torch.ops.prim.device.default
_aten: Any = torch.ops.aten
_parse: Any = torch._C._nn._parse_to  # type: ignore[attr-defined]
# An H100's: kernels cut their work, and so their scratch, by the number of its multiprocessors.
_PROPERTIES = SimpleNamespace(
    name="traced H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32
)


def device_in_cpp(args: tuple[Any, ...]) -> torch.device:
    """Say where C++ is to think that a fake tensor lies; args: of `prim.device`."""
    if args[0].fake_mode.in_kernel_invocation:
        return _META
    return IN_CPP if args[0].fake_device.type == "cuda" else CPU


class _Stream:
    """Stand for a stream: all that is given to it is done."""

    cuda_stream = 0
    device = DEVICE

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def query(self) -> bool:
        """Tell that all is done."""
        return True

    def elapsed_time(self, _end: Any) -> float:
        """Return the milliseconds between two events."""
        return 0.0

    def record_event(self, event: Any = None) -> Any:
        """Return an event of now."""
        return event or _Stream()

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class _Device(contextlib.ContextDecorator):
    """Stand for `torch.cuda.device`."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _cuda_functions() -> dict[str, Any]:
    """List what takes the place of names in torch.cuda."""
    nothing = ("_lazy_init", "init", "empty_cache", "ipc_collect", "set_stream", "synchronize", "set_device")
    total = _PROPERTIES.total_memory
    return {
        **dict.fromkeys(nothing, lambda *_, **__: None),
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: DEVICE,
        "device": _Device,
        "get_device_name": lambda *_: _PROPERTIES.name,
        "get_device_properties": lambda *_: _PROPERTIES,
        "get_device_capability": lambda *_: (_PROPERTIES.major, _PROPERTIES.minor),
        "mem_get_info": lambda *_: (total, total),
        "memory_stats": lambda *_: {},
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda _stream: contextlib.nullcontext(),
        "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_, **__: None,
    }


@contextlib.contextmanager
def replaced_names(answer: Callable[[Tensor], Any]) -> Iterator[None]:
    """Replace the names; `answer` says what number a scalar of the device is."""
    with contextlib.ExitStack() as stack:
        for name, value in _cuda_functions().items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.dict(fake_tensor._DISPATCH_META_HANDLERS, {DEVICE_OF: device_in_cpp}))
        stack.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda _device: None))
        stack.enter_context(patch.object(FakeTensor, "__torch_dispatch__", classmethod(_of_subclass)))
        for name, value in (
            ("is_cuda", property(lambda self: self.fake_device.type == "cuda")),
            ("is_cpu", property(lambda self: self.fake_device.type == "cpu")),
            ("to", _to),
            ("cpu", lambda self, *_, **__: _to(self, CPU)),
            ("cuda", lambda self, *_, **__: _to(self, DEVICE)),
            ("type", _type),
            ("record_stream", lambda *_: None),
            ("pin_memory", lambda self, *_: self),
            ("is_pinned", lambda self, *_: self.fake_device.type == "cpu"),
            (
                "data_ptr",
                lambda self: id(self.untyped_storage()) * 2**20 + self.storage_offset() * self.itemsize,
            ),
        ):
            stack.enter_context(patch.object(FakeTensor, name, value, create=True))
        stack.enter_context(patch.object(torch, "tensor", _tensor_maker(answer)))
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda self, *_: self))
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        yield


_dispatch_of_fakes = FakeTensor.__torch_dispatch__.__func__  # type: ignore[attr-defined]


def _of_subclass(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    if func is DEVICE_OF:
        return device_in_cpp(args)
    return _dispatch_of_fakes(cls, func, types, args, kwargs or {})


def _to(self: FakeTensor, *args: Any, **kwargs: Any) -> Tensor:
    """Do `Tensor.to`: the same tensor where nothing changes, a copy on the other device otherwise."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    elif isinstance(kwargs.get("other"), Tensor):
        other = kwargs.pop("other")
        args = (other.device, other.dtype, *args)
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, memory_format = _parse(*args, **kwargs)
    device = self.device if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = DEVICE
    dtype = dtype or self.dtype
    if not copy and device == self.device and dtype == self.dtype:
        return self
    del non_blocking, memory_format
    changes: dict[str, Any] = {"dtype": dtype} if dtype != self.dtype else {}
    if device != self.device or not changes:
        changes["device"] = device
    return _aten._to_copy.default(self, **changes)


_make_tensor = torch.tensor


def _tensor_maker(answer: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Make `torch.tensor`, which would read scalars of the device without asking."""

    def numbers(data: Any) -> Any:
        if isinstance(data, FakeTensor):
            return answer(data)
        return [numbers(value) for value in data] if isinstance(data, list | tuple) else data

    return lambda data, **kwargs: _make_tensor(numbers(data), **kwargs)


_type_of_tensors = Tensor.type


def _type(self: FakeTensor, *args: Any, **kwargs: Any) -> Any:
    """Do `Tensor.type`, whose names Megatron compares; C++ would leave the device out."""
    if args or kwargs:
        return _to(self, *args, **kwargs)
    name = _type_of_tensors(self)
    return name.replace("torch.", "torch.cuda.") if self.fake_device.type == "cuda" else name


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do `Module._apply` by new parameters: fake ones cannot change in place."""
    if recurse:
        for child in self.children():
            child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            changed = fn(parameter)
        if changed is parameter or (changed.dtype, changed.device) == (parameter.dtype, parameter.device):
            continue
        new = nn.Parameter(changed, requires_grad=parameter.requires_grad)
        marks = {key: value for key, value in vars(parameter).items() if key not in vars(new)}
        vars(new).update(marks)
        self._parameters[name] = new
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self

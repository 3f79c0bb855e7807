"""Makes torch believe in the compiled device, for the rest of this process."""

import contextlib
import time
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.helpers.pretended_gpu.build import load_device


class Stream:
    """Everything is in order already."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cuda_stream = 0

    def wait_stream(self, stream: "Stream") -> None:
        """Nothing to wait for."""

    def wait_event(self, event: "Event") -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Let what is late arrive."""
        load_device().synchronize()

    def query(self) -> bool:
        """Always done."""
        load_device().synchronize()
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        """An event of now."""
        event = event or Event()
        event.record()
        return event

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Event:
    """A moment of the host's clock."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._enable_timing = enable_timing
        self._at_s: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Remember now."""
        self._at_s = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        load_device().synchronize()
        return True

    def synchronize(self) -> None:
        """Let what is late arrive."""
        load_device().synchronize()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds between two events; as in torch both must have been recorded, and with timing."""
        if not (self._enable_timing and end._enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._at_s is None or end._at_s is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return 1000 * (end._at_s - self._at_s)


_Backend: Any = torch._C._distributed_c10d.Backend


class _IsCollectives(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _Backend) and instance.name() == "nccl"


class PretendedNccl(metaclass=_IsCollectives):
    """Stands for `ProcessGroupNCCL`: calling it makes those of collectives.h."""

    class Options(SimpleNamespace):
        """Takes what torch sets."""

    def __new__(cls, store: Any, rank: int, size: int, options: Any) -> Any:
        timeout = getattr(options, "_timeout", timedelta(minutes=10))
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        return load_device().collectives(gloo, rank, size)


class _Device(contextlib.ContextDecorator):
    """`torch.cuda.device`."""

    def __init__(self, device: Any) -> None:
        self._index = _index(device)
        self._before = 0

    def __enter__(self) -> None:
        self._before = torch.cuda.current_device()
        load_device().set_device(self._index)

    def __exit__(self, *_: object) -> None:
        load_device().set_device(self._before)


def _index(device: Any) -> int:
    if device is None:
        return load_device().current_device()
    if isinstance(device, int):
        return device
    found = torch.device(device).index
    return load_device().current_device() if found is None else found


_PROPERTIES = SimpleNamespace(
    name="pretended GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
)


def install(num_devices: int = 8) -> None:
    """Replace what torch was built without. Call it before anything asks for a GPU.

    num_devices: 1 to 8.
    """
    device = load_device()
    device.set_device_count(num_devices)
    device.replace_hooks()
    for name, value in _functions(device).items():
        setattr(torch.cuda, name, value)
    changed: Any = torch
    changed.cuda.random.get_rng_state = torch.cuda.get_rng_state
    changed.cuda.random.set_rng_state = torch.cuda.set_rng_state
    changed.cuda.nvtx = SimpleNamespace(range_push=lambda *_: 0, range_pop=lambda: 0, mark=lambda *_: None)
    changed.Tensor.record_stream = lambda *_: None
    changed._C._cuda_getCurrentRawStream = lambda _: 0
    _resize_storages(device)
    _offer_nccl()


class _Runtime:
    """CUDA's runtime: locks memory of the host; 0 says that it could."""

    def __init__(self, device: ModuleType) -> None:
        self._device = device

    def cudaHostRegister(self, pointer: int, num_bytes: int, _flags: int) -> int:
        self._device.lock_memory(pointer, num_bytes)
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        self._device.unlock_memory(pointer)
        return 0


def _functions(device: ModuleType) -> dict[str, Any]:
    """What takes the place of names in torch.cuda."""
    nothing = (
        "_lazy_init", "init", "empty_cache", "ipc_collect", "set_stream", "set_per_process_memory_fraction",
    )  # fmt: skip
    return {
        **dict.fromkeys(nothing, lambda *_, **__: None),
        "_is_compiled": lambda: True,
        "_lazy_call": lambda call, **_: call(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: device.synchronize(),
        "device_count": device.device_count,
        "current_device": device.current_device,
        "set_device": lambda wanted: device.set_device(_index(wanted)),
        "_exchange_device": _exchange,
        "_maybe_exchange_device": _exchange,
        "device": _Device,
        "get_device_name": lambda *_: _PROPERTIES.name,
        "get_device_properties": lambda *_: _PROPERTIES,
        "get_device_capability": lambda *_: (_PROPERTIES.major, _PROPERTIES.minor),
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (_PROPERTIES.total_memory, _PROPERTIES.total_memory),
        "memory_stats": lambda *_: {},
        "memory_allocated": lambda wanted=None: device.memory_allocated(_index(wanted)),
        "memory_reserved": lambda wanted=None: device.memory_allocated(_index(wanted)),
        "max_memory_allocated": lambda wanted=None: device.max_memory_allocated(_index(wanted)),
        "max_memory_reserved": lambda wanted=None: device.max_memory_allocated(_index(wanted)),
        "reset_peak_memory_stats": lambda wanted=None: device.reset_peak(_index(wanted)),
        "cudart": lambda: _Runtime(device),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "stream": lambda stream: stream if stream is not None else contextlib.nullcontext(),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
        "default_generators": tuple(torch.default_generator for _ in range(device.device_count())),
    }


def _resize_storages(device: ModuleType) -> None:
    """`UntypedStorage.resize_`, which frees and takes back a tensor's memory."""
    on_host = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, num_bytes: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return on_host(storage, num_bytes)
        holder = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        device.resize_storage(holder, num_bytes)
        return storage

    changed: Any = torch.UntypedStorage
    changed.resize_ = resize_


def _offer_nccl() -> None:
    """The backend nccl for process groups."""
    changed: Any = torch
    # 2.27.5, for log lines
    changed._C._nccl_version = lambda: (2 << 32) | (27 << 16) | 5
    changed._C._nccl_version_suffix = lambda: b""
    distributed_c10d._NCCL_AVAILABLE = True
    distributed_c10d.ProcessGroupNCCL = PretendedNccl
    dist.is_nccl_available = lambda: True


def _exchange(wanted: int) -> int:
    before = load_device().current_device()
    if wanted >= 0:
        load_device().set_device(wanted)
    return before

"""Count the memory of tensors while they come and go, and remember who is alive at the peak.

A dispatch mode sees every operation's results. Each storage that it has not seen yet is entered with its
bytes, the source line that made it and the part of the step that it belongs to; a weak reference takes it out
again when torch drops it. What an operation allocates and frees inside itself is not seen: kernels therefore
allocate their scratch by torch, outside their launches.

A step of 15 layers of M3 at 1M tokens with 3 micro-batches in flight takes 40 s of one CPU core.
"""

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Storages below this have no source line: finding it takes longer than the operation.
_NAMED_BYTES = 2**20
# Blocks of CUDA's caching allocator are multiples of this.
_ROUNDING = 512
# Frames of our own and of Megatron's files that name a line; and how far to look for them.
_NAMED_FRAMES, _FRAMES = 3, 80
_FILES = ("/msa_train/", "/msa_kernels/", "/megatron/")


@dataclass(slots=True)
class Entry:
    """Describe one living storage."""

    num_bytes: int
    "bytes, rounded as the allocator rounds them"
    place: str
    "source lines that made it, innermost first; empty for small ones"
    part: str
    "part of the step that it belongs to"
    shape: tuple[int, ...]
    "shape of the tensor that it was first seen through"
    dtype: str
    "dtype of that tensor"
    on_host: bool
    "lies in the host's memory"


@dataclass(slots=True)
class Peak:
    """Hold what was alive when most memory was in use."""

    num_bytes: int = 0
    "bytes in use"
    entries: list[Entry] = field(default_factory=list)
    "what was alive"


class StorageTracker(TorchDispatchMode):
    """Count storages of the device and of the host.

    Args:
        part_of: names the part of a new storage, from the source lines that made it, innermost first.
    """

    def __init__(self, part_of: Callable[[list[str]], str]) -> None:
        super().__init__()
        self.part_of = part_of
        self.current, self.host_current = 0, 0
        self.peak, self.host_peak = Peak(), Peak()
        self._live: dict[int, tuple[weakref.ref[Any], Entry]] = {}
        self._dirty = False
        "the peak has grown since its entries were copied"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and enter the storages of its results."""
        out = self.run(func, args, kwargs or {})
        self.enter(out)
        return out

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation; subclasses answer some in another way."""
        return func(*args, **kwargs)

    def counted(self, tensor: Tensor) -> bool:
        """Tell whether a tensor's memory is counted."""
        return True

    def enter(self, values: Any, part: str = "") -> None:
        """Enter new storages of all tensors in `values`; part: theirs, else found out."""
        if isinstance(values, Tensor):
            self._enter(values, part)
        elif isinstance(values, tuple | list | dict):
            for value in tree_leaves(values):
                if isinstance(value, Tensor):
                    self._enter(value, part)

    def relabel(self, values: Any, part: str) -> None:
        """Give the storages of all tensors in `values` another part, and enter those that are new."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self._enter(value, part)
                found = self._live.get(id(value.untyped_storage()))
                if found is not None:
                    found[1].part = part

    def part(self, tensor: Tensor) -> str:
        """Return the part of a tensor's storage; empty if it is not known."""
        found = self._live.get(id(tensor.untyped_storage()))
        return "" if found is None else found[1].part

    def reset_peak(self) -> None:
        """Begin to look for the peak anew."""
        self.peak, self.host_peak = (
            Peak(self.current, self._entries(False)),
            Peak(self.host_current, self._entries(True)),
        )
        self._dirty = False

    def finish(self) -> None:
        """Make sure that the peaks' entries are those of the peaks."""
        self._remember()

    def _enter(self, tensor: Tensor, part: str) -> None:
        if not self.counted(tensor):
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._live:
            return
        size = storage.nbytes()
        if size == 0:
            return
        num_bytes = -(-size // _ROUNDING) * _ROUNDING
        places = source_lines() if size >= _NAMED_BYTES else []
        entry = Entry(
            num_bytes=num_bytes,
            place=" < ".join(places[:_NAMED_FRAMES]),
            part=part or self.part_of(places),
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            on_host=tensor.device.type == "cpu",
        )
        self._live[key] = (weakref.ref(storage, lambda _, key=key: self._drop(key)), entry)
        if entry.on_host:
            self.host_current += num_bytes
            if self.host_current > self.host_peak.num_bytes:
                self.host_peak.num_bytes, self._dirty = self.host_current, True
        else:
            self.current += num_bytes
            if self.current > self.peak.num_bytes:
                self.peak.num_bytes, self._dirty = self.current, True

    def _drop(self, key: int) -> None:
        # Entries are copied only when memory is given back right after a new peak: once for each hill.
        self._remember()
        found = self._live.pop(key, None)
        if found is None:
            return
        if found[1].on_host:
            self.host_current -= found[1].num_bytes
        else:
            self.current -= found[1].num_bytes

    def _remember(self) -> None:
        if not self._dirty:
            return
        self._dirty = False
        if self.current == self.peak.num_bytes:
            self.peak.entries = self._entries(False)
        if self.host_current == self.host_peak.num_bytes:
            self.host_peak.entries = self._entries(True)

    def _entries(self, on_host: bool) -> list[Entry]:
        return [entry for _, entry in self._live.values() if entry.on_host == on_host]


def source_lines() -> list[str]:
    """List the lines of our own and Megatron's code that are being run, innermost first.

    Example: ["layers/moe.py:158:token_dispatch", "moe/moe_layer.py:301:forward"]. A frame of torch's
    recomputation is listed as "recompute".
    """
    found: list[str] = []
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None:
            break
        name = frame.f_code.co_filename
        if any(part in name for part in _FILES) and "/plan/trace/" not in name:
            short = "/".join(name.rsplit("/", 2)[-2:])
            found.append(f"{short}:{frame.f_lineno}:{frame.f_code.co_name}")
        elif frame.f_code.co_name == "recompute_fn":
            found.append("recompute")
        frame = frame.f_back
    return found

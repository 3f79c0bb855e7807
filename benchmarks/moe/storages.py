"""Count the bytes of live storages and their peak: real or fake tensors, on any device."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StoragePeak(TorchDispatchMode):
    """Follow every storage that an operation makes, until it is freed; a few microseconds an operation."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.current = self.peak = 0
        "bytes"

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        num_bytes = storage.nbytes()
        # the object that holds the storage lives as long as any tensor over it
        self._live[key] = (weakref.ref(storage, lambda _: self._drop(key)), num_bytes)
        self.current += num_bytes
        self.peak = max(self.peak, self.current)

    def _drop(self, key: int) -> None:
        found = self._live.pop(key, None)
        if found is not None:
            self.current -= found[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

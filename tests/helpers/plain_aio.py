"""Let DeepSpeed's offload to NVMe run anywhere: plain reads and writes in place of its compiled library.

DeepSpeed's swappers, ours and the files are the real ones; only the handle that submits reads and writes to
the kernel is this one, which does them when it is waited for. So small that tests' models go to files.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from msa_train.config.deepspeed.async_io import async_io_file
from msa_train.training.engines.deepspeed import swap_folder

# tensors of as many bytes go to files; a multiple of what the disk reads at a time
LEAST_BYTES = 512
NOT_BUILT = (
    f"this environment has not compiled DeepSpeed's async_io, {async_io_file()}: some 5 minutes, with "
    "libaio-dev, g++ and ninja, by python -m msa_train.training.engines.deepspeed.nvme"
)


def is_built() -> bool:
    """Whether the real library is there, of this environment, and nobody is compiling it just now.

    Another environment's is compiled anew at its first use, within the time of a test.
    """
    library, package = async_io_file(), find_spec("deepspeed")
    if package is None or not library.is_file() or library.with_name("lock").exists():
        return False
    recipe, sources = library.with_name("build.ninja"), str(Path(str(package.origin)).parent)
    return not recipe.is_file() or f"{sources}/" in recipe.read_text()


class PlainHandle:
    """Stand in for DeepSpeed's aio_handle."""

    _locked: dict[int, Tensor] = {}  # noqa: RUF012
    "buffers by the address of their memory, of the whole process"

    def __init__(self, **_: Any) -> None:
        self._asked: list[tuple[bool, Tensor, str, int]] = []

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        assert self.is_pinned(buffer), "the kernel reads into locked memory"
        self._asked.append((True, buffer, path, offset))
        return 0

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        assert self.is_pinned(buffer), "the kernel writes from locked memory"
        self._asked.append((False, buffer, path, offset))
        return 0

    def wait(self) -> int:
        asked, self._asked = self._asked, []
        for is_read, buffer, path, offset in asked:
            assert buffer.nbytes % 512 == 0, f"{buffer.nbytes} bytes are no whole blocks of the disk"
            memory = memoryview(buffer.view(torch.uint8).numpy())
            file = os.open(path, os.O_RDONLY if is_read else os.O_WRONLY | os.O_CREAT, 0o600)
            done = os.preadv(file, [memory], offset) if is_read else os.pwritev(file, [memory], offset)
            os.close(file)
            assert done == buffer.nbytes, f"{path}: {done} bytes in place of {buffer.nbytes}"
        return len(asked)

    def new_cpu_locked_tensor(self, count: int, example: Tensor) -> Tensor:
        made = torch.full((count,), 7, dtype=example.dtype)
        self._locked[made.untyped_storage().data_ptr()] = made
        return made

    def free_cpu_locked_tensor(self, buffer: Tensor) -> bool:
        return self._locked.pop(buffer.untyped_storage().data_ptr(), None) is not None

    def is_pinned(self, buffer: Tensor) -> bool:
        return buffer.untyped_storage().data_ptr() in self._locked


def install(*, real: bool = False) -> None:
    """Make DeepSpeed move small tensors too, by the real library or by the stand-in; for this process."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

    optimizer_utils.MIN_AIO_BYTES = partitioned_param_swapper.MIN_AIO_BYTES = LEAST_BYTES
    swap_folder._LEAST_BYTES = 1
    if not real:
        type(AsyncIOBuilder()).load = lambda self, verbose=False: SimpleNamespace(aio_handle=PlainHandle)

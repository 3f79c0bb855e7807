"""Keep a process's swap files in a folder of its own, which nobody else uses and which does not outlive it.

DeepSpeed names swap files by rank and parameter alone, so two jobs with one `deepspeed.nvme_path` would write
into each other's, and a process that was killed leaves its own behind. Here each process has

    nvme_path/msa_train-<name>/          holds a lock on it, which ends with the process however that ends
        lock
        zero_stage_3/...                 DeepSpeed's

and takes it away when it ends. Folders whose process has ended without doing so are taken away by the next
one that starts on that disk. Nothing in a folder is ever read by another process.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

_PREFIX = "msa_train-"
_LOCK = "lock"
_TRIES = 100
# smaller tensors are not worth a file
_LEAST_BYTES = 2**20


class SwapFolder:
    """Own a folder for the files of this process."""

    def __init__(self, disk: str | Path) -> None:
        """Make the folder, and take away those of processes that have ended.

        Args:
            disk: `deepspeed.nvme_path`; exists.

        Raises:
            OSError: it cannot be written.
        """
        clear_left_behind(Path(disk))
        # held open until the process ends, or the folder is taken away
        self.path, self._lock = _new_folder(Path(disk))
        # at exit too, if nobody has before
        self.remove = weakref.finalize(self, _remove, self.path, self._lock, os.getpid())

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """Make a tensor whose memory is a file, so that the system may write it out when memory is short.

        The file has no name any more when this returns, and its place on the disk is free again when the
        tensor is.

        Args:
            count: elements; small tensors are in memory.
            dtype: of the elements.

        Raises:
            OSError: the disk is full.
        """
        num_bytes = count * dtype.itemsize
        if num_bytes < _LEAST_BYTES:
            return torch.empty(count, dtype=dtype)
        handle, name = tempfile.mkstemp(dir=self.path)
        try:
            # else a full disk would end the process by a signal, when the memory is written
            os.posix_fallocate(handle, 0, num_bytes)
            return torch.from_file(name, shared=True, size=count, dtype=dtype)
        finally:
            os.close(handle)
            os.unlink(name)


def clear_left_behind(disk: Path) -> None:
    """Take away the folders of processes that have ended, of this user."""
    for folder in sorted(disk.glob(f"{_PREFIX}*")):
        lock = _locked(folder / _LOCK, make=False)
        if lock is not None:
            _remove(folder, lock, os.getpid())


def _new_folder(disk: Path) -> tuple[Path, int]:
    """Make a folder and lock it.

    Until it is locked, another process may take it for one left behind; then another one is made.

    Raises:
        OSError: the disk cannot be written.
    """
    for _ in range(_TRIES):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=disk))
        lock = _locked(folder / _LOCK)
        if lock is not None and os.fstat(lock).st_nlink:
            return folder, lock
        if lock is not None:
            os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)
    raise OSError(f"{disk}: no file can be locked there")


def _locked(file: Path, *, make: bool = True) -> int | None:
    """Open and lock a file; None where another process holds it, or there is none."""
    try:
        handle = os.open(file, os.O_RDWR | (os.O_CREAT if make else 0), 0o600)
    except OSError:
        # being made or taken away just now, or another user's
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove(folder: Path, lock: int, owner: int) -> None:
    """Take a folder away; a forked child of its owner leaves it alone."""
    if os.getpid() != owner:
        return
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(lock)

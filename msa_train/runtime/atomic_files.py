"""Write files whole or not at all, in folders that others may write to as well. Standard library only.

A name in such a folder can be a link that leads to a file of the user's own. So no link is followed: a file
is made under a new, random name and moved to its place, and one that is appended to must not be a link.
Folders may be links, as of a run whose checkpoints lie on another disk.
"""

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial")


@contextmanager
def new_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file that appears whole or not at all, and on the disk, when the block ends.

    Example: stopped.json is written as .stopped.json.0123456789abcdef.partial, synced, then renamed.

    Args:
        path: where it appears, in place of a file or link of that name.
        mode: "w" for text in UTF-8, "wb" for bytes.

    Raises:
        OSError: if the disk does not take it; the partial file is removed then.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    encoding = None if "b" in mode else "utf-8"
    try:
        # x: made here, so it leads nowhere else
        with partial.open(mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def open_to_append(path: Path) -> TextIO:
    """Open a text file to read and append to, made where there is none.

    Raises:
        OSError: if the name is a link, or something else than a file.
    """
    # O_NOFOLLOW refuses links, O_NONBLOCK does not wait for a pipe's other end
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            target = f"a link to {os.readlink(path)}, which is not followed; remove the link"
            raise OSError(errno.ELOOP, target, str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file; remove it", str(path))
    return open(descriptor, "a+", encoding="utf-8")


def is_full(error: OSError) -> bool:
    """Tell whether something could not be written because the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Bring one file, or the names in one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def remove_partials(folder: Path) -> None:
    """Remove what `new_file` has left where its process was killed; nobody may be writing into the folder."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a file that appears whole or not at all."""
    with new_file(path) as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")


def free_bytes(path: Path) -> int:
    """Free space on the disk where `path` is or would be."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize

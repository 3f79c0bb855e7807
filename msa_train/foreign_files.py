"""Reading files that somebody else made: regular ones, of limited size and depth, and only where they belong.

A name in a downloaded folder may be a pipe that never ends, a device, or a link to a private key; JSON may be
nested until the interpreter gives up. Standard library only, below all other packages.
"""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from msa_train.config.text import excerpt

MIB = 2**20
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; anything else is refused and never waited for.

    Raises:
        OSError: also for pipes, devices and sockets, with a strerror that says so.
    """
    # opening some devices has effects, so their kind is asked first, and again of what was opened
    _check_regular(path, os.stat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def regular_size(path: Path) -> int:
    """Bytes of a regular file, which is not opened.

    Raises:
        OSError: as `open_regular`.
    """
    status = os.stat(path)
    _check_regular(path, status.st_mode)
    return status.st_size


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Content of a regular file.

    Raises:
        OSError: as `open_regular`, and EFBIG for more than max_bytes.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1) or b""
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"has more than {max_bytes:,} bytes", str(path))
    return content


def parse_json(content: bytes | str) -> Any:
    """A JSON value; names that an object says twice, NaN and Infinity are refused, a byte order mark is not.

    Raises:
        ValueError: without the path, e.g. "is not JSON (Expecting value: line 1 column 1 (char 0))".
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("is not JSON of a sensible depth (its values are nested too deeply)") from None
    except UnicodeDecodeError:
        raise ValueError("is not JSON (it is not UTF-8)") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({excerpt(str(error))})") from None


def member(folder: Path, name: str) -> Path:
    """The file that an entry of a folder is, links followed.

    It must be in the folder, or in the store of the Hugging Face hub cache that the folder is a snapshot of:
    there snapshots/REVISION/NAME is a link to ../../blobs/HASH.

    Raises:
        ValueError: one line, for a name with folders in it and for a link that leads elsewhere.
        OSError: if there is no such file.
    """
    if not is_plain_name(name):
        raise ValueError(
            f"{folder}: names a file {excerpt(name)!r}, which must be a plain name in the folder"
        )
    # not Path.resolve: before Python 3.13 links in a circle are no OSError there
    root = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(root / name, strict=True))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{folder / name}: is a link out of its folder; copy the file there if it belongs there, or "
            "remove the link"
        )
    return real


def read_json(folder: Path, name: str, max_bytes: int) -> dict[str, Any]:
    """The object in a JSON file of a downloaded folder.

    Raises:
        ValueError: one line, if it is not there, leads out of the folder, is too large or no JSON object.
    """
    try:
        content = read_limited(member(folder, name), max_bytes)
    except OSError as error:
        raise ValueError(
            f"{folder / name}: cannot be read ({error.strerror}); fetch it, or name the folder that holds it"
        ) from None
    try:
        value = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{folder / name}: {error}; fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{folder / name}: is not a JSON object; fetch the file again")
    return value


def read_record(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """Some values of a small JSON object beside a run; texts are one line.

    Args:
        path: of the file.
        kinds: type of each value, by name; others are left out.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: one line, if it is damaged.
    """
    try:
        content = parse_json(read_limited(path, MIB))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({excerpt(str(error))}); remove it") from None
    for name, kind in kinds.items():
        if not isinstance(content, dict) or type(content.get(name)) is not kind:
            raise ValueError(f"{path}: is damaged ({name} is not there or of another kind); remove it")
    values = {name: content[name] for name in kinds}
    return {name: excerpt(value) if isinstance(value, str) else value for name, value in values.items()}


def is_plain_name(name: object) -> bool:
    """Whether this can name a file in a folder: no separators, all of it can be printed, not hidden."""
    if not isinstance(name, str) or not name.isprintable() or "/" in name:
        return False
    return bool(name) and not name.startswith(".")


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file", str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{excerpt(name, 60)} is there twice")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")

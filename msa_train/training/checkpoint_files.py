"""Files of one checkpoint folder, and what its manifest.json says of them. Standard library only.

A folder may come from anywhere. So its files are regular ones in the folder itself: a name that leads out of
it, a pipe that never ends or a device is damage, found before anything is opened.
"""

import json
import os
import re
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from msa_train.config.text import excerpt
from msa_train.files import new_file
from msa_train.foreign_files import open_regular, parse_json, read_limited, regular_size
from msa_train.model.checkpoint_pickles import COMMON_NAME, METADATA_NAME

META_NAME, MANIFEST_NAME = "meta.json", "manifest.json"
# Megatron's: in which form the tensors are stored
BACKEND_NAME, BACKEND = "metadata.json", "torch_dist"
# read by whoever loads a checkpoint, whether the manifest lists them or not
_READ_ANYWAY = {METADATA_NAME, COMMON_NAME, BACKEND_NAME}
_SHARD_SUFFIX = ".distcp"
# some thousand files of 100 bytes each are usual
_MAX_JSON_BYTES = 64 * 2**20
_READ_BYTES = 4 * 2**20
_CRC32 = re.compile(r"[0-9a-f]{8}")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Entry of each file by its name in the folder: "size" and "crc32".

    Raises:
        ValueError: if manifest.json cannot be understood, or names what cannot be in the folder.
        OSError: if it cannot be read.
    """
    files = _read_object(folder / MANIFEST_NAME).get("files")
    if not (isinstance(files, dict) and META_NAME in files and all(map(_is_entry, files.values()))):
        raise ValueError(f"{MANIFEST_NAME}: lists no sizes and checksums")
    for name in files:
        if not _is_name(name):
            raise ValueError(f"{MANIFEST_NAME}: lists {excerpt(name)!r}, which is no name in the folder")
    return files


def read_meta(folder: Path) -> dict[str, Any]:
    """Content of meta.json.

    Raises:
        ValueError: if it cannot be understood.
        OSError: if it cannot be read.
    """
    return _read_object(folder / META_NAME)


def listed_damage(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with the files that a manifest lists, without reading them, and with those it does not.

    Args:
        folder: the checkpoint.
        files: its manifest.

    Raises:
        OSError: for a file that is not there, or is none.
    """
    for name, entry in files.items():
        if _leads_out(folder, name):
            return f"{file_words(name)}: is a link out of the checkpoint; copy the file there"
        size = regular_size(folder / name)
        if size != entry["size"]:
            return f"{file_words(name)}: {size} bytes instead of {entry['size']}"
    unlisted = sorted(name for name in os.listdir(folder) if is_read(name) and name not in files)
    return not_listed(unlisted[0]) if unlisted else None


def backend_damage(folder: Path) -> str | None:
    """What is wrong with the file that says how the tensors are stored.

    Raises:
        ValueError: if it cannot be understood.
        OSError: if it cannot be read.
    """
    backend = _read_object(folder / BACKEND_NAME)
    is_ours = backend.get("sharded_backend") == BACKEND
    return None if is_ours else f"{BACKEND_NAME}: is of another form than {BACKEND}"


def checksum_damage(folder: Path, name: str, crc32: str) -> str | None:
    """What is wrong with the content of one file."""
    try:
        return None if file_checksum(folder / name) == crc32 else f"{file_words(name)}: checksum"
    except FileNotFoundError:
        return f"{file_words(name)}: missing"
    except OSError as error:
        return f"{file_words(name)}: {error.strerror}"


def places_damage(places: Collection[str], files: Collection[str]) -> str | None:
    """What is wrong with the places that the list of tensors names: no checksum speaks for those unlisted."""
    unlisted = sorted(set(places) - set(files))
    return not_listed(unlisted[0]) if unlisted else None


def not_listed(name: str) -> str:
    """Says that no checksum is known of a file that is read."""
    return f"{MANIFEST_NAME}: does not list {excerpt(name)}"


def is_read(name: str) -> bool:
    """Whether loading a checkpoint reads a file of this name, if there is one."""
    return name in _READ_ANYWAY or name.endswith(_SHARD_SUFFIX)


def file_checksum(path: Path) -> str:
    """CRC-32 as 8 hexadecimal digits."""
    crc = 0
    with open_regular(path) as file:
        while piece := file.read(_READ_BYTES):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def file_entry(path: Path) -> dict[str, Any]:
    """What manifest.json says about a file."""
    return {"size": path.stat().st_size, "crc32": file_checksum(path)}


def write_json(path: Path, value: object) -> None:
    """Write a file that appears whole or not at all."""
    with new_file(path) as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")


def file_words(name: str) -> str:
    """A file for a message, e.g. "model file __0_0.distcp"."""
    if name in (META_NAME, MANIFEST_NAME):
        return name
    return f"model file {name}" if name.endswith(_SHARD_SUFFIX) else f"file {name}"


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    size, crc32 = entry.get("size"), entry.get("crc32")
    return type(size) is int and size >= 0 and isinstance(crc32, str) and bool(_CRC32.fullmatch(crc32))


def _is_name(name: str) -> bool:
    return name.isprintable() and "/" not in name and name not in ("", ".", "..", MANIFEST_NAME)


def _leads_out(folder: Path, name: str) -> bool:
    """Whether a name is a link to a file elsewhere; the folder itself may be behind a link.

    Raises:
        OSError: with the name in the folder, for a link that leads to nothing or round in circles.
    """
    path = folder / name
    if not path.is_symlink():
        return False
    # a link to nothing has no real path, and its reason must name the link
    os.stat(path)
    return os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder)


def _read_object(path: Path) -> dict[str, Any]:
    if _leads_out(path.parent, path.name):
        raise ValueError(f"{path.name}: is a link out of the checkpoint; copy the file there")
    try:
        value = parse_json(read_limited(path, _MAX_JSON_BYTES))
    except ValueError as error:
        raise ValueError(f"{path.name}: is not JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: is not a JSON object")
    return value

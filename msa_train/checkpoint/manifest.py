"""Check the files of one checkpoint folder against its manifest.json. Standard library only.

    structure_damage        names, sizes, meta.json, places in .metadata: reads small files only
    stored_damage           objects in the folder are plain values: a few KB each
    first_checksum_damage   CRC-32 of every file: reads everything

`..._damage` functions return one line of what is wrong, without the folder, or None.

A folder may come from anywhere. So its files are regular ones in the folder itself: a name that leads out of
it, a pipe that never ends or a device is damage, found before anything is opened.
"""

import os
import re
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from msa_train.checkpoint.meta import META_NAME, meta_damage
from msa_train.checkpoint.torch_dist.safe_pickles import (
    COMMON_NAME,
    METADATA_NAME,
    metadata_places,
    objects_damage,
)
from msa_train.config.text import excerpt
from msa_train.runtime.untrusted_files import open_regular, parse_json, read_limited, regular_size

MANIFEST_NAME = "manifest.json"
# Megatron's: in which form the tensors are stored
BACKEND_NAME, BACKEND = "metadata.json", "torch_dist"
# read by whoever loads a checkpoint, whether the manifest lists them or not
_READ_ANYWAY = {METADATA_NAME, COMMON_NAME, BACKEND_NAME}
_SHARD_SUFFIX = ".distcp"
# some thousand files of 100 bytes each are usual
_MAX_JSON_BYTES = 64 * 2**20
_READ_BYTES = 4 * 2**20
_CRC32 = re.compile(r"[0-9a-f]{8}")
PUBLISHED = re.compile(r"step_(\d{8,})")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the entry of each file by its name in the folder.

    Example: {"meta.json": {"size": 812, "crc32": "0a1b2c3d"}}, size in bytes, CRC-32 in hexadecimal digits.

    Raises:
        ValueError: if manifest.json cannot be understood, or names what cannot be in the folder.
        OSError: if it cannot be read.
    """
    files = _read_object(folder / MANIFEST_NAME).get("files")
    if not (isinstance(files, dict) and META_NAME in files and all(map(_is_entry, files.values()))):
        raise ValueError(f"{MANIFEST_NAME}: lists no sizes and checksums")
    for name in files:
        if not _is_name(name):
            raise ValueError(f"{MANIFEST_NAME}: lists {excerpt(repr(name))}, which is no name in the folder")
    return files


def read_meta(folder: Path) -> dict[str, Any]:
    """Read meta.json.

    Raises:
        ValueError: if it cannot be understood.
        OSError: if it cannot be read.
    """
    return _read_object(folder / META_NAME)


def listed_damage(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """Check the files that a manifest lists, without reading them, and those that it does not list.

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
    # A reader takes these by their names, so one that somebody added would be read without a checksum.
    unlisted = sorted(name for name in os.listdir(folder) if is_read(name) and name not in files)
    return not_listed(unlisted[0]) if unlisted else None


def backend_damage(folder: Path) -> str | None:
    """Check the file that says how the tensors are stored.

    Raises:
        ValueError: if it cannot be understood.
        OSError: if it cannot be read.
    """
    backend = _read_object(folder / BACKEND_NAME)
    is_ours = backend.get("sharded_backend") == BACKEND
    return None if is_ours else f"{BACKEND_NAME}: is of another form than {BACKEND}"


def checksum_damage(folder: Path, name: str, crc32: str) -> str | None:
    """Compare the checksum of one file, which is read whole.

    Args:
        folder: the checkpoint.
        name: of the file.
        crc32: 8 hexadecimal digits, from the manifest.
    """
    try:
        return None if file_checksum(folder / name) == crc32 else f"{file_words(name)}: checksum"
    except FileNotFoundError:
        return f"{file_words(name)}: missing"
    except OSError as error:
        return f"{file_words(name)}: {error.strerror}"


def places_damage(places: Collection[str], files: Collection[str]) -> str | None:
    """Check the places that the list of tensors names: no checksum speaks for files that are not listed.

    Args:
        places: names of files.
        files: names in the manifest.
    """
    unlisted = sorted(set(places) - set(files))
    return not_listed(unlisted[0]) if unlisted else None


def not_listed(name: str) -> str:
    """Say that no checksum is known of a file that is read."""
    return f"{MANIFEST_NAME}: does not list {excerpt(name)}"


def is_read(name: str) -> bool:
    """Tell whether loading a checkpoint reads a file of this name, if there is one."""
    return name in _READ_ANYWAY or name.endswith(_SHARD_SUFFIX)


def file_checksum(path: Path) -> str:
    """Compute the CRC-32 of a file as 8 hexadecimal digits, 4 MiB at a time.

    Raises:
        OSError: if it cannot be read, or is no regular file.
    """
    crc = 0
    with open_regular(path) as file:
        while piece := file.read(_READ_BYTES):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def file_entry(path: Path) -> dict[str, Any]:
    """Make the entry of a file in manifest.json: {"size": bytes, "crc32": 8 digits}. Reads it whole."""
    return {"size": path.stat().st_size, "crc32": file_checksum(path)}


def file_words(name: str) -> str:
    """Name a file for a message, e.g. "model file __0_0.distcp"."""
    if name in (META_NAME, MANIFEST_NAME):
        return name
    return f"model file {name}" if name.endswith(_SHARD_SUFFIX) else f"file {name}"


def _is_entry(entry: object) -> bool:
    """Tell whether an entry of the manifest has a size and a checksum; True and -1 are no sizes."""
    if not isinstance(entry, dict):
        return False
    size, crc32 = entry.get("size"), entry.get("crc32")
    return type(size) is int and size >= 0 and isinstance(crc32, str) and bool(_CRC32.fullmatch(crc32))


def _is_name(name: str) -> bool:
    """Tell whether a name stays in its folder and can be printed; the manifest has no checksum of itself."""
    return name.isprintable() and "/" not in name and name not in ("", ".", "..", MANIFEST_NAME)


def _leads_out(folder: Path, name: str) -> bool:
    """Tell whether a name is a link to a file elsewhere; the folder itself may be behind a link.

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
    """Read a JSON object of limited size.

    Raises:
        ValueError: naming the file, if it is none.
        OSError: if it cannot be read.
    """
    if _leads_out(path.parent, path.name):
        raise ValueError(f"{path.name}: is a link out of the checkpoint; copy the file there")
    try:
        value = parse_json(read_limited(path, _MAX_JSON_BYTES))
    except ValueError as error:
        raise ValueError(f"{path.name}: is not JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: is not a JSON object")
    return value


def verify_folder(folder: Path, *, full: bool) -> str | None:
    """Check any checkpoint folder, as CheckpointStore.verify those of a run.

    Args:
        folder: the checkpoint.
        full: read everything and compare checksums.
    """
    reason = structure_damage(folder)
    if reason is None and full:
        reason = stored_damage(folder) or first_checksum_damage(folder)
    return reason


def structure_damage(folder: Path) -> str | None:
    """Check names and sizes of the files, meta.json and manifest.json; reads none of the tensors."""
    if not folder.is_dir():
        return f"{folder.name}: is no folder"
    try:
        files = read_manifest(folder)
        # in this order: nothing in meta.json is believed before its checksum is compared
        reason = listed_damage(folder, files) or checksum_damage(folder, META_NAME, files[META_NAME]["crc32"])
        reason = reason or meta_damage(read_meta(folder), step_of(folder))
        if reason is None and BACKEND_NAME in files:
            reason = backend_damage(folder)
        if reason is None and METADATA_NAME in files:
            reason = places_damage(metadata_places(folder), files)
        return reason
    except FileNotFoundError as error:
        name = Path(error.filename).name
        hint = "; some tools leave out names with a dot when they copy" if name == METADATA_NAME else ""
        return f"{file_words(name)}: missing{hint}"
    except OSError as error:
        return f"{file_words(Path(error.filename).name)}: {error.strerror}"
    except ValueError as error:
        return str(error)


def stored_damage(folder: Path) -> str | None:
    """Check stored objects, of a folder whose structure is sound: a stranger's could be code."""
    return objects_damage(folder) if METADATA_NAME in read_manifest(folder) else None


def first_checksum_damage(folder: Path) -> str | None:
    """Compare the checksums of all files in one process, up to the first wrong one by name."""
    entries = sorted(read_manifest(folder).items())
    reasons = (checksum_damage(folder, name, entry["crc32"]) for name, entry in entries)
    return next((reason for reason in reasons if reason), None)


def step_of(folder: Path) -> int | None:
    """Read the step from a folder's name: step_00000200 -> 200; None for other names."""
    match = PUBLISHED.fullmatch(folder.name)
    return int(match[1]) if match else None

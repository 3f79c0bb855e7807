"""Bring files to the disk, and tell by checksums if they are what was written. Standard library only."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from msa_train.runtime.atomic_files import sync

_READ_BYTES = 4 << 20
# 64 windows of 128 KiB are 8 MiB
_SAMPLE_WINDOWS, _SAMPLE_BYTES = 64, 128 << 10


def sync_tree(folder: Path) -> None:
    """Bring a folder and everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def file_crc32(path: str | Path) -> int:
    """Compute the CRC-32 of a whole file (that of zlib and gzip, RFC 1952); "123456789" -> 0xcbf43926."""
    crc = 0
    with open(path, "rb") as stream:
        while piece := stream.read(_READ_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc


def sample_crc32(path: str | Path) -> int:
    """Compute the CRC-32 of up to 8 MiB spread over a file: quick for any size, and it sees zeros.

    Example: 64 windows of a file of 1 GiB begin at bytes 0, 17041440, 34082881, ..., 1073610752; files of up
    to 128 KiB are read whole.
    """
    size, crc = os.path.getsize(path), 0
    last = max(size - _SAMPLE_BYTES, 0)
    with open(path, "rb") as stream:
        for begin in sorted({last * i // (_SAMPLE_WINDOWS - 1) for i in range(_SAMPLE_WINDOWS)}):
            crc = _window_crc32(stream, begin, crc)
    return crc


def _window_crc32(stream: BinaryIO, begin: int, crc: int) -> int:
    stream.seek(begin)
    return zlib.crc32(stream.read(_SAMPLE_BYTES), crc)


def digest(parts: Iterable[object]) -> str:
    """Hash plain JSON values to 16 hexadecimal digits (SHA-256); ["a", 1] -> 2657442bb4a48d62."""
    return hashlib.sha256(json.dumps(list(parts)).encode("ascii")).hexdigest()[:16]

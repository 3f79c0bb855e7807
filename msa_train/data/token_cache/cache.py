"""Keep tokenized corpora on disk: built whole or not at all, checked before use.

CACHE_DIR/
    CACHEDIR.TAG                backup tools leave the folder out, and so does the search for a corpus
    0123456789abcdef01234567/   named by the corpus' files and the tokenizer
        corpus.bin, corpus.idx      tokens, see store.py
        documents.dat               [3, num_documents] 64-bit little-endian: hash of the name, bytes, tokens
        provenance.dat              [num_documents] uint8, how each was made; only where one was joined
        corpus.json                 sizes and CRC-32 of these files
    ....partial-*/              being written, or left by a crash

Cost for N tokens in D documents: corpus.bin has 2 N bytes (4 N from 65,500 ids on), corpus.idx 42 + 20 D,
documents.dat 24 D. At 4 bytes of text per token, 1 TB of text becomes 250 billion tokens, at most 1 TB again.
Nothing is ever removed: each corpus and tokenizer has a folder of its own.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from msa_train.config import DataConfig
from msa_train.data.corpora.listing import TAG_NAME, TAG_TEXT
from msa_train.data.corpora.sources import Source
from msa_train.data.tokenizers.tokenizer import Tokenizer
from msa_train.runtime.atomic_files import sync
from msa_train.runtime.checksums import digest, file_crc32, sample_crc32, sync_tree

FORMAT = 2
"part of every cache key; raise it when the files' content or meaning changes"
FULL_CHECK_BYTES = 8 << 30
"above this only samples of a file are compared with its checksum"
DOCUMENTS_NAME, MANIFEST_NAME = "documents.dat", "corpus.json"
MAKINGS_NAME = "provenance.dat"
_NAMES = ("corpus.bin", "corpus.idx", DOCUMENTS_NAME)


@dataclass(slots=True)
class Documents:
    """Hold parallel arrays over the documents of a corpus of text, kept beside the tokens."""

    hashes: npt.NDArray[np.uint64]
    "[num_documents] uint64, hash of the name, see split.hash_name"
    num_bytes: npt.NDArray[np.int64]
    "[num_documents] int64, bytes of text"
    num_tokens: npt.NDArray[np.int64]
    "[num_documents] int64, tokens, the end of the document included"


def cache_root(data: DataConfig) -> Path:
    """Create `data.cache_dir`, tagged as a cache.

    Raises:
        ValueError: if that is not possible.
    """
    root = Path(data.cache_dir).expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not (root / TAG_NAME).exists():
            (root / TAG_NAME).write_text(TAG_TEXT, encoding="ascii")
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={data.cache_dir}: cannot be created ({error.strerror}); "
            "give a folder that can be written to"
        ) from error
    return root


def cache_key(data: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    """Name the folder of a corpus by what its tokens follow from: 24 hexadecimal digits of a SHA-256."""
    # times and sizes of files stand for their content: to hash a terabyte is to read it
    parts = [FORMAT, source.is_stdlib, source.fingerprint(), tokenizer.fingerprint, data.text_field]
    return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()[:24]


def build(data: DataConfig, folder: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """Write the token files beside `folder`, bring them to the disk and move them there in one step.

    Of several processes that do so at once, the first to finish wins; what the others wrote is the same.

    Args:
        data: the settings, for messages.
        folder: where the files shall be.
        write: fills a folder and returns what the reader of corpus.json should know.

    Raises:
        ValueError: if the disk does not take them, or what `write` raises.
    """
    # beside the target, on the same file system: only then a rename is one step
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir()
        _publish(partial, folder, write(partial))
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={data.cache_dir}: cannot be written ({error.strerror or error}); give another "
            "folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path, summary: dict[str, Any]) -> None:
    names = [*_NAMES, *(name for name in (MAKINGS_NAME,) if (partial / name).exists())]
    files = {name: _entry(partial / name) for name in names}
    manifest = {"format": FORMAT, **summary, "files": files}
    (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync_tree(partial)
    try:
        # a rename onto a folder that is not empty fails: another process was first, with the same files
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    sync(folder.parent)


def _entry(path: Path) -> dict[str, int]:
    """Return what corpus.json says about a file. It is read back once, which is little beside tokenizing."""
    size, crc32 = path.stat().st_size, file_crc32(path)
    return {"size": size, "crc32": crc32, "sample_crc32": sample_crc32(path)}


def write_documents(path: Path, documents: Documents) -> None:
    """Write the arrays one after another, 24 bytes per document, little-endian; 2 documents -> 48 bytes."""
    with path.open("wb") as stream:
        for array in (documents.hashes, documents.num_bytes, documents.num_tokens):
            stream.write(array.astype(array.dtype.newbyteorder("<")).tobytes())


def read_documents(folder: Path) -> Documents:
    """Read the arrays of a cached corpus, [num_documents] each.

    Raises:
        ValueError: if the file cannot hold them.
    """
    # read as unsigned throughout: sizes are never negative, hashes use all 64 bits
    raw = np.fromfile(folder / DOCUMENTS_NAME, "<u8").astype(np.uint64, copy=False)
    if len(raw) == 0 or len(raw) % 3:
        raise ValueError(f"{DOCUMENTS_NAME}: holds no three arrays")
    hashes, num_bytes, num_tokens = raw.reshape(3, -1)
    return Documents(hashes, num_bytes.view(np.int64), num_tokens.view(np.int64))


def write_makings(folder: Path, made_by: npt.NDArray[np.uint8]) -> None:
    """Write how each document was made, see origin.MADE_BY; no file where all are as they were found."""
    if made_by.any():
        made_by.astype(np.uint8).tofile(folder / MAKINGS_NAME)


def read_makings(folder: Path, num_documents: int) -> npt.NDArray[np.uint8] | None:
    """Map how each document was made: [num_documents] uint8; None where all are as they were found.

    Raises:
        ValueError: if the file has another size.
    """
    path = folder / MAKINGS_NAME
    if not path.exists():
        return None
    if path.stat().st_size != num_documents:
        raise ValueError(
            f"data.cache_dir: {folder} is damaged ({MAKINGS_NAME} has not {num_documents} bytes); remove it, "
            "and it is built again"
        )
    return np.memmap(path, np.uint8, mode="r")


def read_findings(folder: Path) -> list[str]:
    """Read what the tokenizer had to say about the corpus; nothing in caches of earlier versions."""
    try:
        findings = json.loads((folder / MANIFEST_NAME).read_bytes()).get("findings", [])
    except (OSError, ValueError, AttributeError):
        return []
    return [line for line in findings if isinstance(line, str)] if isinstance(findings, list) else []


def check_cache(data: DataConfig, folder: Path) -> tuple[str, dict[str, int]]:
    """Compare the files of a cached corpus with their sizes and checksums.

    Files above FULL_CHECK_BYTES (8 GiB) are compared in samples of 8 MiB: a terabyte would take many minutes
    at every start, more than 15 at 1 GB/s.

    Returns:
        A digest that changes when any token, or the name of any document, does; size of each file by name.

    Raises:
        ValueError: naming the file that is damaged.
    """
    try:
        files: dict[str, dict[str, int]] = json.loads((folder / MANIFEST_NAME).read_bytes())["files"]
        entries = {name: files[name] for name in _NAMES}
        # how documents were made is no part of their content, which a digest tells
        listed = [*_NAMES, *(name for name in (MAKINGS_NAME,) if name in files)]
        reasons = [f"{name}: {reason}" for name in listed if (reason := _damage(folder / name, files[name]))]
        # by the recorded checksums, so that a check by samples gives the same digest as a full one
        content = digest(entries[name][key] for name in _NAMES for key in ("size", "crc32"))
        sizes = {name: entry["size"] for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(data, folder, f"{MANIFEST_NAME}: lists no sizes and checksums") from error
    except OSError as error:
        raise damaged(data, folder, f"{error.filename}: {error.strerror}") from error
    if reasons:
        raise damaged(data, folder, reasons[0])
    return content, sizes


def _damage(path: Path, entry: dict[str, int]) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "missing"
    if size != entry["size"]:
        return f"{size} bytes instead of {entry['size']}"
    # 8 GiB take about ten seconds to read and check at 1 GB/s
    whole = size <= FULL_CHECK_BYTES
    sound = file_crc32(path) == entry["crc32"] if whole else sample_crc32(path) == entry["sample_crc32"]
    return None if sound else "checksum"


def damaged(data: DataConfig, folder: Path, reason: str) -> ValueError:
    """Word the one line that reports a damaged cache."""
    return ValueError(
        f"data.cache_dir={data.cache_dir}: {folder} is damaged ({reason}); remove it, and it is built again"
    )

"""Keep the packing of a large corpus on disk, mapped by all processes: made once, by one of them.

CACHE_DIR/packs/KEY/           named by the documents, the split, data.seed, lengths of packs and blocks
    train/, validation/
        begin.dat              [num_pieces] int64, first token in the .bin
        length.dat             [num_pieces] int32, tokens
        goes_on.dat            [num_pieces] uint8, 1: the document goes on behind the piece
        pack_slots.dat         [num_packs + 1] int64, see packing.Packing
        index.json             sizes, and CRC-32 of samples
    train_epoch_00000000/      the same for an epoch:
        slot_piece.dat         [num_pieces] uint32 (int64 from 2^32 on), piece in each slot
        pack_order.dat         [num_packs] int64, shape of each pack

Little-endian numbers and nothing else: nothing in these files is executed. Sizes and samples are compared at
each start; a piece that points outside the .bin is an error when it is read. 13 bytes per piece and 4 per
piece and epoch: 100M documents take 1.3 GB, and 0.4 GB for each epoch. Nothing is ever removed.

Measured with 100M documents in packs of 196,608 tokens, on two cores shared with much else: the process that
makes the files needs 70 s of processor time, 30 s more for an epoch, and 9.6 GB at most; a later start needs
1.4 s, and no memory of its own beside the mapped pages.

A rank maps the files: pages that it reads are shared by all ranks of a machine, and given back when memory is
short. Smaller corpora, below MIN_DOCUMENTS, are packed in memory by every rank, in less time than files take.
"""

import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from msa_train.config.text import excerpt
from msa_train.data.packing import Packing, deal_pieces, pack_documents
from msa_train.runtime.atomic_files import sync
from msa_train.runtime.build_once import build_once
from msa_train.runtime.checksums import digest, sample_crc32, sync_tree
from msa_train.runtime.untrusted_files import read_json, regular_size

FORMAT = 1
"part of every name; raise it when the files' content or meaning changes"
MIN_DOCUMENTS = 1_000_000
"of a corpus whose packing is kept on disk: below it a rank packs in 0.5 s and 30 MB"
_MANIFEST, _MANIFEST_BYTES = "index.json", 1 << 16
_PIECE_FILES = {"begin": "<i8", "length": "<i4", "goes_on": "|u1", "pack_slots": "<i8"}


@dataclass(slots=True)
class PackTable:
    """Hold where the pieces of all packs lie in the .bin, in memory or mapped."""

    begin: npt.NDArray[np.integer]
    "[num_pieces] first token in the .bin"
    length: npt.NDArray[np.integer]
    "[num_pieces] tokens"
    goes_on: npt.NDArray[np.integer]
    "[num_pieces] 1 where the document goes on behind the piece, else 0"
    pack_slots: npt.NDArray[np.integer]
    "[num_packs + 1] see Packing"
    block_size: int
    "alignment of pieces"
    seed: int
    "of every shuffle, together with the epoch"
    num_documents: int
    "of an epoch"
    num_tokens: int
    "of an epoch"
    folder: Path | None = None
    "where it is mapped from, and epochs are kept; None: in memory"

    @property
    def num_packs(self) -> int:
        """Count the packs of one epoch."""
        return len(self.pack_slots) - 1

    def order(self, epoch: int) -> "EpochOrder":
        """Return what fills the packs of an epoch; mapped, if the table is and the disk takes it."""
        if self.folder is not None:
            folder = self.folder.with_name(f"{self.folder.name}_epoch_{epoch:08d}")
            try:
                build_once(folder, lambda: _write(folder, self._deal(epoch).arrays(), {}))
            except OSError:
                # full or read-only: the same numbers in memory
                return self._deal(epoch)
            kinds = {"slot_piece": _index_type(len(self.length)), "pack_order": "<i8"}
            arrays, _ = _map(folder, kinds)
            return EpochOrder(arrays["slot_piece"], arrays["pack_order"])
        return self._deal(epoch)

    def _deal(self, epoch: int) -> "EpochOrder":
        blocks = -(-np.asarray(self.length) // self.block_size)
        return EpochOrder(*deal_pieces(blocks, self.num_packs, self.seed, epoch))


@dataclass(slots=True)
class EpochOrder:
    """Hold what fills the packs of one epoch, see packing.EpochPlan."""

    slot_piece: npt.NDArray[np.integer]
    "[num_pieces] piece in each slot"
    pack_order: npt.NDArray[np.integer]
    "[num_packs] shape of each pack"

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays as they are stored."""
        kind = _index_type(len(self.slot_piece))
        return {"slot_piece": self.slot_piece.astype(kind), "pack_order": self.pack_order.astype("<i8")}


def table_of(
    packing: Packing,
    begin: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    *,
    block_size: int,
    goes_on: npt.NDArray[np.uint8] | None = None,
) -> PackTable:
    """Make the table of a packing in memory: 13 bytes per piece.

    Args:
        packing: of the documents.
        begin: [num_documents] first token of each document in the .bin.
        lengths: [num_documents] tokens of each.
        block_size: alignment of pieces.
        goes_on: [num_documents] 1 where there is more of the document behind its end here; None: nowhere.
    """
    pieces = packing.pieces
    ends = pieces.start.astype(np.int64) + pieces.length
    more = (ends < lengths[pieces.doc]).astype(np.uint8)
    if goes_on is not None:
        more |= goes_on[pieces.doc]
    return PackTable(
        begin=begin[pieces.doc] + pieces.start,
        length=pieces.length,
        goes_on=more,
        pack_slots=packing.pack_slots,
        block_size=block_size,
        seed=packing.seed,
        num_documents=len(lengths),
        num_tokens=int(lengths.sum()),
    )


def empty_table(*, seq_len: int, block_size: int, seed: int) -> PackTable:
    """Make the table of no documents."""
    nothing = pack_documents(np.zeros(0, np.int64), seq_len=seq_len, block_size=block_size, seed=seed)
    return table_of(nothing, np.zeros(0, np.int64), np.zeros(0, np.int64), block_size=block_size)


def index_folder(cache: Path, facts: list[Any]) -> Path:
    """Return the folder of a corpus' packings.

    Args:
        cache: data.cache_dir.
        facts: plain JSON; all that the packs follow from.
    """
    return cache / "packs" / digest([FORMAT, *facts])


def mapped_table(
    folder: Path, make: Callable[[], PackTable], *, block_size: int, seed: int
) -> PackTable | None:
    """Map a table, made by one process where it is missing; None where the disk does not take it.

    Args:
        folder: of this table.
        make: makes it in memory.
        block_size: alignment of pieces.
        seed: of every shuffle.

    Raises:
        ValueError: if the files are not what was written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        build_once(folder, lambda: _write_table(folder, make()))
    except OSError:
        return None
    arrays, counts = _map(folder, _PIECE_FILES)
    return PackTable(
        **arrays,
        block_size=block_size,
        seed=seed,
        num_documents=counts["num_documents"],
        num_tokens=counts["num_tokens"],
        folder=folder,
    )


def _write_table(folder: Path, table: PackTable) -> None:
    arrays = {name: getattr(table, name).astype(kind) for name, kind in _PIECE_FILES.items()}
    _write(folder, arrays, {"num_documents": table.num_documents, "num_tokens": table.num_tokens})


def _write(folder: Path, arrays: dict[str, npt.NDArray[Any]], counts: dict[str, int]) -> None:
    """Write a folder that appears whole or not at all; the first of several writers wins."""
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir()
        files: dict[str, Any] = {}
        for name, array in arrays.items():
            path = partial / f"{name}.dat"
            array.tofile(path)
            files[name] = {"size": path.stat().st_size, "sample_crc32": sample_crc32(path)}
        content = {"format": FORMAT, **counts, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
        sync_tree(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _map(folder: Path, kinds: dict[str, str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, int]]:
    """Map the arrays of a folder, their sizes and samples compared; also its counts.

    Raises:
        ValueError: if one is not what was written.
    """
    try:
        content = read_json(folder, _MANIFEST, _MANIFEST_BYTES)
        arrays = {
            name: _map_file(folder / f"{name}.dat", kind, content["files"]) for name, kind in kinds.items()
        }
        counts = {name: int(content.get(name, 0)) for name in ("num_documents", "num_tokens")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data.cache_dir: {folder} is damaged ({excerpt(error)}); remove it, and it is built again"
        ) from error
    return arrays, counts


def _map_file(path: Path, kind: str, files: dict[str, Any]) -> npt.NDArray[Any]:
    size, entry = regular_size(path), files[path.stem]
    if size != entry["size"] or size % np.dtype(kind).itemsize:
        raise ValueError(f"{path.name}: {size} bytes instead of {entry['size']}")
    if sample_crc32(path) != entry["sample_crc32"]:
        raise ValueError(f"{path.name}: checksum")
    # nothing can be mapped of an empty file
    return np.memmap(path, dtype=kind, mode="r") if size else np.zeros(0, kind)


def _index_type(count: int) -> str:
    return "<u4" if count < 1 << 32 else "<i8"

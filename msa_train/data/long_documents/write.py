"""Write documents that were made as a corpus of JSONL, in a folder that appears whole or not at all."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zstandard

SUMMARY_NAME = ".prepared.json"
"hidden, so that it is no part of the corpus"
SHARD_BYTES = 1 << 30
"of text in a file of the output"


@dataclass(slots=True)
class LongDocument:
    """Hold one document that was made."""

    name: str
    "of its group, with #1, #2 ... where that was cut"
    text: str
    "joined"
    made_by: str
    "one of origin.MADE_BY"
    parts: list[str]
    "names of the texts, in their order"
    notes: dict[str, int]
    "more that is to be known, such as imports that were cut"

    def record(self) -> dict[str, Any]:
        """Return the line of the output; plain JSON."""
        provenance = {"made_by": self.made_by, "name": self.name, "parts": self.parts, **self.notes}
        return {"text": self.text, "provenance": provenance}


@dataclass(slots=True)
class Prepared:
    """Sum up what was made."""

    documents: int = 0
    "that were written"
    parts: int = 0
    "texts in them"
    num_bytes: int = 0
    "of text"
    longest: int = 0
    "bytes of the longest document"
    made_by: dict[str, int] = field(default_factory=dict[str, int])
    "documents by how they were made"
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    "files by why they were not taken"


def write_corpus(
    output: Path,
    documents: Iterator[LongDocument],
    prepared: Prepared,
    told: Callable[[], dict[str, Any]],
    origin: str,
) -> Prepared:
    """Write OUTPUT/part-00000.jsonl.zst, ... of 1 GiB of text each, and OUTPUT/.prepared.json.

    Give the folder to data.corpus, or to a source of data.mixture.

    Args:
        output: new folder.
        documents: one after another; what they raise leaves nothing behind.
        prepared: counts along.
        told: what was asked for, and is kept beside the sums; asked after the last document.
        origin: what has no text where there are no documents.

    Raises:
        ValueError: one line naming what is wrong.
    """
    if output.exists():
        raise ValueError(f"--output={output}: exists already; remove it, or name another folder")
    partial = output.with_name(f"{output.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        _write(partial, documents, prepared)
        if not prepared.documents:
            raise ValueError(f"{origin}: holds no text; give another folder or file")
        summary = {**told(), "prepared": asdict(prepared)}
        (partial / SUMMARY_NAME).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        partial.rename(output)
    except OSError as error:
        raise ValueError(f"--output={output}: cannot be written ({error.strerror}); name another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return prepared


def _write(folder: Path, documents: Iterator[LongDocument], prepared: Prepared) -> None:
    """Write shards; `prepared` counts along."""
    document = next(documents, None)
    number = 0
    while document is not None:
        size = 0
        path = folder / f"part-{number:05d}.jsonl.zst"
        with path.open("wb") as file, zstandard.ZstdCompressor(level=6).stream_writer(file) as stream:
            while document is not None and size < SHARD_BYTES:
                stream.write(json.dumps(document.record()).encode() + b"\n")
                length = len(document.text.encode("utf-8"))
                size += length
                prepared.documents += 1
                prepared.parts += len(document.parts)
                prepared.num_bytes += length
                prepared.longest = max(prepared.longest, length)
                prepared.made_by[document.made_by] = prepared.made_by.get(document.made_by, 0) + 1
                document = next(documents, None)
        number += 1

"""Join texts to long documents, in an order that means something, and write them as JSONL.

Each record tells how it was made:

    {"text": ..., "provenance": {"made_by": "repository_imports", "name": "numpy#1",
                                 "parts": ["numpy/version.py", ...], "imports_cut": 3}}

The trainer reads that along with the text: metrics and `msa-data stats` have shares by `made_by`. What was
one text before stays `as_is`.

Cost: one group in memory (a repository without its files above 1 MiB, a book), or a window of texts; the
output has as many bytes as the texts, before compression.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from msa_train.data.corpora.lines import MAX_LINE_BYTES
from msa_train.data.long_documents.imports import Repository, dependency_order
from msa_train.data.long_documents.parts import (
    MAX_FILE_BYTES,
    Fields,
    Group,
    LeftOut,
    natural_key,
    read_groups,
)
from msa_train.data.long_documents.topics import chain
from msa_train.data.long_documents.write import LongDocument, Prepared, write_corpus

MOST_BYTES = MAX_LINE_BYTES // 4
"of a document: JSON may need several bytes for one"


class Join(Enum):
    """Choose what belongs together, and in which order."""

    imports = "imports"  # files of a repository, what is imported before what imports it
    paths = "paths"  # files of a repository by their paths
    chapters = "chapters"  # texts of a folder, or of a group of records, by number: chapter 2 before 10
    topic = "topic"  # texts in a chain of nearest neighbours by their rare words


_MADE_BY = {
    Join.imports: "repository_imports",
    Join.paths: "repository_paths",
    Join.chapters: "chapters",
    Join.topic: "topic",
}


@dataclass(kw_only=True, slots=True)
class Request:
    """Say what is joined, and how."""

    paths: list[str]
    "folders, or files of JSONL"
    join: Join
    "what belongs together"
    fields: Fields = field(default_factory=Fields)
    "of JSONL records"
    max_bytes: int = 16 << 20
    "of a document; longer ones are cut between two texts"
    window: int = 50_000
    "topic: texts among which neighbours are looked for"


def make_documents(request: Request, left_out: LeftOut) -> Iterator[LongDocument]:
    """Yield the documents, in an order that follows from the input alone.

    Raises:
        ValueError: one line naming what is wrong.
    """
    is_code = request.join in (Join.imports, Join.paths)
    groups = read_groups(
        request.paths,
        request.fields,
        left_out,
        by_folder=request.join is Join.chapters,
        max_bytes=MAX_FILE_BYTES if is_code else None,
    )
    if request.join is Join.topic:
        yield from _by_topic(groups, request)
        return
    for group in groups:
        order, notes = _order(group, request.join)
        texts = [_with_name(name, group.texts[name], is_code=is_code) for name in order]
        yield from _cut(group.name, order, texts, request, notes)


def _order(group: Group, join: Join) -> tuple[list[str], dict[str, int]]:
    if join is Join.imports:
        order, cut = dependency_order(Repository(group.texts))
        return order, {"imports_cut": cut}
    return sorted(group.texts, key=natural_key if join is Join.chapters else None), {}


def _with_name(name: str, text: str, *, is_code: bool) -> str:
    """Put its path above a file of code, which imports speak of; a chapter has its own title."""
    return f"# file: {name}\n{text}\n" if is_code else f"{text.strip()}\n\n"


def _cut(
    name: str, names: Sequence[str], texts: Sequence[str], request: Request, notes: dict[str, int]
) -> Iterator[LongDocument]:
    """Join texts up to the largest size; a text that is larger by itself stays one document."""
    runs: list[list[int]] = []
    size = 0
    for place, text in enumerate(texts):
        length = len(text.encode("utf-8"))
        if not runs or size + length > request.max_bytes:
            runs.append([])
            size = 0
        runs[-1].append(place)
        size += length
    for number, run in enumerate(runs, 1):
        made_by = _MADE_BY[request.join] if len(run) > 1 else "as_is"
        own = f"{name}#{number}" if len(runs) > 1 else name
        yield LongDocument(own, "".join(texts[i] for i in run), made_by, [names[i] for i in run], notes)


def _by_topic(groups: Iterator[Group], request: Request) -> Iterator[LongDocument]:
    """Chain the texts of one window after another."""
    names: list[str] = []
    texts: list[str] = []
    windows = 0
    for group in groups:
        for name, text in group.texts.items():
            names.append(f"{group.name}/{name}")
            texts.append(text)
            if len(texts) == request.window:
                windows += 1
                yield from _window(windows, names, texts, request)
                names, texts = [], []
    if texts:
        yield from _window(windows + 1, names, texts, request)


def _window(number: int, names: list[str], texts: list[str], request: Request) -> Iterator[LongDocument]:
    order = chain(texts)
    chained = [_with_name("", texts[i], is_code=False) for i in order]
    yield from _cut(f"topic{number}", [names[i] for i in order], chained, request, {})


def prepare_long(request: Request, output: Path) -> Prepared:
    """Write the documents into a folder that appears whole or not at all.

    OUTPUT/part-00000.jsonl.zst, ... of 1 GiB of text each, and OUTPUT/.prepared.json with the request and
    what became of it. Give the folder to data.corpus, or to a source of data.mixture.

    Raises:
        ValueError: one line naming what is wrong.
    """
    if not 1 <= request.max_bytes <= MOST_BYTES:
        raise ValueError(f"--max-bytes={request.max_bytes}: must be from 1 to {MOST_BYTES}")
    if request.window < 2:
        raise ValueError(f"--window={request.window}: must be at least 2, as neighbours are looked for in it")
    left_out, prepared = LeftOut(), Prepared()

    def told() -> dict[str, Any]:
        prepared.left_out = dict(left_out.counts)
        return {"request": asdict(request) | {"join": request.join.value}}

    return write_corpus(output, make_documents(request, left_out), prepared, told, request.paths[0])

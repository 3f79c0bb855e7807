"""Read what long documents are made of: groups of named texts, one group in memory at a time."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from msa_train.data.corpora.lines import BoundError, iterate_lines
from msa_train.data.corpora.listing import WHOLE_FOLDER, list_files
from msa_train.data.corpora.sources import PACKED_SUFFIXES, RECORD_SUFFIXES

MAX_FILE_BYTES = 1 << 20
"of a file in a repository: larger ones are data, or were written by programs"
_PROBE_BYTES = 8192


@dataclass(slots=True)
class Group:
    """Hold texts that belong together: a repository, a book."""

    name: str
    "of the group, unique among those that are read"
    texts: dict[str, str]
    "by name: path below the root, chapter"


@dataclass(slots=True)
class Fields:
    """Name the fields of JSONL records."""

    text: str = "text"
    "the text itself"
    group: str = ""
    "what belongs together, such as repo_name or book_id; records of a group follow one another"
    name: str = ""
    "path or chapter within the group; empty: in the order of the records"


@dataclass(slots=True)
class LeftOut:
    """Count what was not taken, and why."""

    counts: Counter[str] = field(default_factory=Counter[str])
    "files or records by reason"


def read_groups(
    paths: Sequence[str], fields: Fields, left_out: LeftOut, *, by_folder: bool, max_bytes: int | None
) -> Iterator[Group]:
    """Yield the groups of all paths, in the order of the paths.

    Args:
        paths: folders, of which each is a group, or files of JSONL with the fields.
        fields: of JSONL records.
        left_out: counts what is passed over: binary, not UTF-8, too large, empty.
        by_folder: each folder below a path that holds files is a group of its own, as books are kept.
        max_bytes: largest file of a folder; None: any.

    Raises:
        ValueError: one line naming what is wrong.
    """
    names: set[str] = set()
    for path in paths:
        place = Path(path).expanduser()
        if place.is_dir():
            groups = _folders(place, left_out, by_folder=by_folder, max_bytes=max_bytes)
        elif place.is_file() and _is_records(place):
            groups = _record_groups(place, fields)
        elif place.is_file():
            text = _text_of(place, left_out, None)
            groups = iter([Group(place.stem, {place.name: text})] if text else [])
        else:
            raise ValueError(f"{path}: does not exist; give a folder, or a file of JSONL")
        for group in groups:
            if group.name in names:
                raise ValueError(
                    f"{path}: group {group.name} comes a second time; sort the records by it, or give each "
                    "folder once"
                )
            names.add(group.name)
            yield group


def _is_records(path: Path) -> bool:
    endings = tuple(kind + packed for kind in RECORD_SUFFIXES for packed in PACKED_SUFFIXES)
    return path.name.lower().endswith(endings)


def _folders(root: Path, left_out: LeftOut, *, by_folder: bool, max_bytes: int | None) -> Iterator[Group]:
    """Read a folder as one group, or each folder with files in it as one."""
    files = [Path(path) for path in list_files(str(root), root, WHOLE_FOLDER, ()).paths]
    if not files:
        raise ValueError(f"{root}: holds no file that is not hidden; give another folder")
    by_group: dict[Path, list[Path]] = {}
    for file in files:
        by_group.setdefault(file.parent if by_folder else root, []).append(file)
    for folder, members in by_group.items():
        texts = {
            member.relative_to(folder).as_posix(): text
            for member in members
            if (text := _text_of(member, left_out, max_bytes))
        }
        if texts:
            inside = folder.relative_to(root).as_posix()
            name = root.resolve().name
            yield Group(name if inside == "." else f"{name}/{inside}", texts)


def _text_of(path: Path, left_out: LeftOut, max_bytes: int | None) -> str:
    """Read a file of text; empty, and counted, where it is none."""
    try:
        size = os.path.getsize(path)
        if max_bytes is not None and size > max_bytes:
            left_out.counts[f"larger than {max_bytes:,} bytes"] += 1
            return ""
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); repair it or leave it out") from error
    if b"\0" in data[:_PROBE_BYTES]:
        left_out.counts["not text"] += 1
        return ""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        left_out.counts["not UTF-8"] += 1
        return ""
    if not text.strip():
        left_out.counts["empty"] += 1
        return ""
    return text


def _record_groups(path: Path, fields: Fields) -> Iterator[Group]:
    """Join records of a group that follow one another."""
    group: Group | None = None
    for number, record in read_records(path, fields.text):
        place = f"{path}:{number}"
        name = str(_field(record, fields.group, place)) if fields.group else place
        if group is not None and group.name != name:
            yield group
            group = None
        if group is None:
            group = Group(name, {})
        part = str(_field(record, fields.name, place)) if fields.name else f"{number:012d}"
        if part in group.texts:
            raise ValueError(f"{place}: group {name} has {part} twice; name records by another field")
        group.texts[part] = record[fields.text]
    if group is not None:
        yield group


def read_records(path: Path, text_field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number (from 1) and record of each line of JSONL that is not empty.

    Raises:
        ValueError: naming the line that is not as it should be.
    """
    number = 0
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(iterate_lines(path.name, stream), 1):
                if line.strip():
                    record: object = json.loads(line)
                    place = f"{path}:{number}"
                    if not isinstance(record, dict):
                        raise ValueError(f"{place}: is not a JSON object; correct or remove the line")
                    fields = cast(dict[str, Any], record)
                    if not isinstance(_field(fields, text_field, place), str):
                        raise ValueError(f"{place}: has no string in field {text_field}; correct the line")
                    yield number, fields
    except BoundError as error:
        raise ValueError(f"{path}:{number + 1} {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: is not JSON ({error}); correct or remove the line") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); repair it") from error


def _field(record: dict[str, Any], name: str, place: str) -> Any:
    if name not in record:
        known = ", ".join(list(record)[:8]) or "none"
        raise ValueError(f"{place}: has no field {name}; name one of its fields: {known}")
    return record[name]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts numbers in names as numbers: "chapter 2" before "chapter 10"."""
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]

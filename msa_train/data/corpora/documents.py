"""Read the documents of a corpus, one after another."""

import codecs
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

import zstandard

from msa_train.data.corpora.lines import BoundError, iterate_lines
from msa_train.data.corpora.sources import Source, SourceFile
from msa_train.data.errors import corpus_error, unreadable
from msa_train.data.origin import MADE_BY

# Git's rule for what is not text; it also catches UTF-16, images and compressed files.
_BINARY_PROBE_BYTES = 8192
_PACKED = {
    "gzip": (b"\x1f\x8b",),
    "zstd": (b"\x28\xb5\x2f\xfd",),
    "bzip2": tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)),
    "xz": (b"\xfd7zXZ",),
    "lz4": (b"\x04\x22\x4d\x18",),
    "zip": (b"PK\x03\x04",),
}
"how files begin; short ones may have no zero byte"
MAX_TEXT_BYTES = 1 << 30
"a file of plain text is one document, which is tokenized whole: that takes ten times its size in memory"
_JSON_FIX = (
    "write a record in each line (jq -c '.[]' turns an array into that), or call it .txt if it is a text"
)


def iterate_documents(source: Source, *, text_field: str, needs_utf8: bool) -> Iterator[tuple[str, bytes]]:
    """Yield name and text of every document, in the same order every time, one in memory at a time.

    Args:
        source: the files.
        text_field: key of the text in JSONL records.
        needs_utf8: files that are not UTF-8 are an error; else their bytes are taken as they are.

    Example: notes.txt -> ("notes.txt", its bytes); the second record of a.jsonl -> ("a.jsonl:2", its text
    field).

    Raises:
        ValueError: naming the file, and the line of a JSONL file, that is not as it should be.
    """
    for name, text, _ in iterate_made(source, text_field=text_field, needs_utf8=needs_utf8):
        yield name, text


def iterate_made(source: Source, *, text_field: str, needs_utf8: bool) -> Iterator[tuple[str, bytes, int]]:
    """Do as `iterate_documents`, and tell how each was made, as a place in origin.MADE_BY.

    A record of JSONL says so in its field "provenance", as `msa-data prepare` writes it.
    """
    if source.is_stdlib:
        for name, text in _grouped_documents(source):
            yield name, text, 0
        return
    for file in source.files:
        if file.is_jsonl:
            yield from _jsonl_documents(source.corpus, file, text_field)
        else:
            yield file.document, _read_text(source.corpus, file, needs_utf8), 0


def _grouped_documents(source: Source) -> Iterator[tuple[str, bytes]]:
    for document, files in itertools.groupby(source.files, key=lambda file: file.document):
        parts: list[bytes] = []
        for file in files:
            text = _read(source.corpus, file)
            # A few of Python's own tests are in other encodings; no user can mend that, so they are left out.
            if _utf8_error(text) is None:
                parts += [f"# file: {file.name}\n".encode(), text, b"\n"]
        yield document, b"".join(parts)


def _read(corpus: str, file: SourceFile) -> bytes:
    if file.size > MAX_TEXT_BYTES:
        raise corpus_error(
            corpus,
            f"{file.path} has {file.size:,} bytes in one document, at most {MAX_TEXT_BYTES:,}; split it, "
            "or make it JSONL with a document in each line",
        )
    try:
        with open(file.path, "rb") as stream:
            # at most one byte more than was listed: a file that grows is refused by the check that follows
            text = stream.read(file.size + 1)
            _check_unchanged(corpus, file, stream)
    except OSError as error:
        raise unreadable(corpus, file.path, error) from error
    return text


def _check_unchanged(corpus: str, file: SourceFile, stream: BinaryIO) -> None:
    """Check that this is still the file that was listed: tokens are found again by its size and time."""
    status = os.fstat(stream.fileno())
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise corpus_error(
            corpus, f"{file.path} has changed since it was listed; start again when it is complete"
        )


def _read_text(corpus: str, file: SourceFile, needs_utf8: bool) -> bytes:
    text = _read(corpus, file)
    packed = next((name for name, begins in _PACKED.items() if text.startswith(begins)), None)
    if packed or b"\0" in text[:_BINARY_PROBE_BYTES]:
        raise corpus_error(
            corpus,
            f"{file.path} is not text (it {f'is a {packed} file' if packed else 'has a zero byte'}); "
            "decompress or convert it to UTF-8, or use a glob that leaves it out",
        )
    position = _utf8_error(text) if needs_utf8 else None
    if position is not None:
        raise corpus_error(
            corpus,
            f"{file.path} is not UTF-8 (byte {position}); convert it to UTF-8 or use data.tokenizer=bytes",
        )
    # A byte order mark says how to read a file and is no part of the text.
    return text.removeprefix(codecs.BOM_UTF8) if needs_utf8 else text


def _utf8_error(text: bytes) -> int | None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


def _jsonl_documents(corpus: str, file: SourceFile, text_field: str) -> Iterator[tuple[str, bytes, int]]:
    # number: of the last line read, so that an error names the next one
    number = 0
    # .json is the name of other things too
    is_json = file.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json")
    fix = _JSON_FIX if is_json else "correct or remove the line"
    try:
        with open(file.path, "rb") as stream:
            for number, line in enumerate(iterate_lines(file.name, stream), 1):
                if line.strip():
                    place = f"{file.path}:{number}"
                    text, made_by = _record_text(corpus, place, line, text_field, fix)
                    yield f"{file.document}:{number}", text, made_by
            _check_unchanged(corpus, file, stream)
    except BoundError as error:
        raise corpus_error(corpus, f"{file.path}:{number + 1} {error}") from error
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise unreadable(corpus, f"{file.path}:{number + 1}", error) from error


def _record_text(corpus: str, place: str, line: bytes, text_field: str, fix: str) -> tuple[bytes, int]:
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise corpus_error(corpus, f"{place} is not JSON ({error}); {fix}") from error
    if not isinstance(record, dict):
        raise corpus_error(corpus, f"{place} is not a JSON object, which each line must be; {fix}")
    fields = cast(dict[str, object], record)
    if text_field not in fields:
        keys = ", ".join(itertools.islice(fields, 8)) or "none"
        raise corpus_error(
            corpus, f"{place} has no field data.text_field={text_field}; set it to one of its fields: {keys}"
        )
    text = fields[text_field]
    if not isinstance(text, str):
        raise corpus_error(
            corpus, f"{place} has no string in field data.text_field={text_field}; correct the line"
        )
    try:
        return text.encode("utf-8"), _making(fields.get("provenance"))
    except UnicodeEncodeError as error:
        raise corpus_error(
            corpus, f"{place} holds half of a surrogate pair, which is no character; correct the line"
        ) from error


def _making(provenance: object) -> int:
    """Return the place in MADE_BY; 0, as it was found, for what others may have put into the field."""
    made_by = cast(dict[str, object], provenance).get("made_by") if isinstance(provenance, dict) else None
    return MADE_BY.index(made_by) if isinstance(made_by, str) and made_by in MADE_BY else 0

"""Documents of a corpus, one after another."""

import codecs
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, cast

import zstandard

from msa_train.data.errors import corpus_error, unreadable
from msa_train.data.sources import Source, SourceFile

# Git's rule for what is not text; it also catches UTF-16, images and compressed files.
_BINARY_PROBE_BYTES = 8192
_READ_BYTES = 1 << 17
# zstd refuses the windows that its --long option makes unless told otherwise.
_ZSTD_WINDOW_BYTES = 1 << 31


def iterate_documents(source: Source, *, text_field: str, needs_utf8: bool) -> Iterator[tuple[str, bytes]]:
    """Name and text of every document, in the same order every time.

    Args:
        source: the files.
        text_field: key of the text in JSONL records.
        needs_utf8: whether files that are not UTF-8 are an error; else their bytes are taken as they are.

    Raises:
        ValueError: naming the file, and the line of a JSONL file, that is not as it should be.
    """
    if source.is_stdlib:
        yield from _grouped_documents(source)
        return
    for file in source.files:
        if file.is_jsonl:
            yield from _jsonl_documents(source.corpus, file, text_field)
        else:
            yield file.document, _read_text(source.corpus, file, needs_utf8)


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
    try:
        with open(file.path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise unreadable(corpus, file.path, error) from error


def _read_text(corpus: str, file: SourceFile, needs_utf8: bool) -> bytes:
    text = _read(corpus, file)
    if b"\0" in text[:_BINARY_PROBE_BYTES]:
        raise corpus_error(
            corpus,
            f"{file.path} is not text (it has a zero byte); "
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


def _jsonl_documents(corpus: str, file: SourceFile, text_field: str) -> Iterator[tuple[str, bytes]]:
    number = 0
    try:
        with open(file.path, "rb") as stream:
            for number, line in enumerate(_lines(file.name, stream), 1):
                if line.strip():
                    place = f"{file.path}:{number}"
                    yield f"{file.document}:{number}", _record_text(corpus, place, line, text_field)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise unreadable(corpus, f"{file.path}:{number + 1}", error) from error


def _record_text(corpus: str, place: str, line: bytes, text_field: str) -> bytes:
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise corpus_error(corpus, f"{place} is not JSON ({error}); correct or remove the line") from error
    if not isinstance(record, dict):
        raise corpus_error(corpus, f"{place} is not a JSON object; each line must be one, with its text")
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
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise corpus_error(
            corpus, f"{place} holds half of a surrogate pair, which is no character; correct the line"
        ) from error


def _lines(name: str, stream: BinaryIO) -> Iterable[bytes]:
    if name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=stream)
    if name.lower().endswith(".zst"):
        return _split_lines(_zstd_chunks(stream))
    return stream


def _zstd_chunks(stream: BinaryIO) -> Iterator[bytes]:
    # The library's own stream_reader takes a file that was cut off for a complete one, hence decompressobj.
    decoder: zstandard.ZstdDecompressionObj | None = None
    while chunk := stream.read(_READ_BYTES):
        while chunk:
            if decoder is None:
                decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
            yield decoder.decompress(chunk)
            chunk = b""
            if decoder.eof:
                chunk, decoder = decoder.unused_data, None
    if decoder is not None:
        raise EOFError("the file ends in the middle of a frame")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pending.append(first)
        if others:
            yield b"".join(pending)
            yield from others[:-1]
            pending = [others[-1]]
    yield b"".join(pending)

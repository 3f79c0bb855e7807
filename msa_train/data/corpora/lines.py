"""Read lines of plain, gzip and zstd files, with bounds: kilobytes can unpack to more than any memory holds.

Formats: RFC 1952 (gzip) and RFC 8878 (Zstandard).
"""

import gzip
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import zstandard

MAX_LINE_BYTES = 128 << 20
"a record; the longest books have a hundredth, and reading one takes several times its size in memory"
# Text of people packs to a third, logs to a hundredth; gzip ends at 1,032, zstd at several ten thousand.
MAX_RATIO, RATIO_FREE_BYTES = 250, 64 << 20
_READ_BYTES = 1 << 17
# One call unpacks all that it is given, and 4 bytes can stand for 128 KiB: so at most 32 MiB come at once.
_ZSTD_READ_BYTES = 1 << 10
# zstd refuses the windows that its --long option makes unless told otherwise.
_ZSTD_WINDOW_BYTES = 1 << 31


class BoundError(Exception):
    """Report a file that nobody means as a corpus; the text says what is beyond bounds, and what to do."""


def iterate_lines(name: str, stream: BinaryIO) -> Iterator[bytes]:
    """Yield lines without their ends; the name's ending says how the file is packed.

    Memory: one line, at most 128 MiB, and the pieces it is joined from. Example: "ab\\nc" and "d\\n" -> "ab",
    "cd" and an empty line behind the last end.

    Raises:
        BoundError: if a line or what is unpacked is beyond all measure.
        OSError, EOFError, zlib.error, zstandard.ZstdError: if the file cannot be read or unpacked.
    """
    name = name.lower()
    if name.endswith(".gz"):
        return _split_lines(_bounded(_chunks(gzip.GzipFile(fileobj=stream)), stream))
    if name.endswith(".zst"):
        return _split_lines(_bounded(_zstd_chunks(stream), stream))
    return _split_lines(_chunks(stream))


def _chunks(stream: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    while chunk := stream.read(_READ_BYTES):
        yield chunk


def _bounded(chunks: Iterable[bytes], packed: BinaryIO) -> Iterator[bytes]:
    """Compare what was unpacked with what was read of the packed file for it."""
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > RATIO_FREE_BYTES and total > MAX_RATIO * packed.tell():
            raise BoundError(
                f"unpacks to more than {MAX_RATIO} times its size, which no text does; "
                "unpack it yourself if it is one, or leave it out"
            )
        yield chunk


def _zstd_chunks(stream: BinaryIO) -> Iterator[bytes]:
    # The library's own stream_reader takes a file that was cut off for a complete one, hence decompressobj.
    decoder: zstandard.ZstdDecompressionObj | None = None
    while chunk := stream.read(_ZSTD_READ_BYTES):
        while chunk:
            if decoder is None:
                decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
            unpacked = decoder.decompress(chunk)
            for begin in range(0, len(unpacked), _READ_BYTES):
                yield unpacked[begin : begin + _READ_BYTES]
            chunk = b""
            if decoder.eof:
                chunk, decoder = decoder.unused_data, None
    if decoder is not None:
        raise EOFError("the file ends in the middle of a frame")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    # pieces of a line are joined once at its end: adding them one by one takes the square of its length
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pending.append(first)
        size += len(first)
        if size > MAX_LINE_BYTES:
            raise BoundError(
                f"has more than {MAX_LINE_BYTES >> 20} MiB without an end of line; give each document a line "
                "of its own, and split those that are longer"
            )
        if others:
            yield b"".join(pending)
            yield from others[:-1]
            pending, size = [others[-1]], len(others[-1])
    yield b"".join(pending)

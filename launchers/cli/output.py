"""Keep standard output and error usable for all commands: losing one of them never ends what a command does.

A run of days must not end because its terminal was closed. A reader that leaves (`| head`), a full disk, a
closed stream and a terminal without the letters of a name are all survived. What a terminal would act on is
escaped on its way, whatever printed it: names of files, texts of errors and entries of other people's
checkpoints can hold escape sequences.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO, cast

from msa_train.config import printable

# a progress bar is drawn anew by \r
_KEPT = "\n\r\t"


def say(text: object, *, lines: bool = False, error: bool = False, end: str = "\n") -> None:
    """Print what may hold text from files or names, at once; all commands print by this.

    Args:
        text: anything; its str().
        lines: whether it has line breaks and tabs of its own; else they are escaped too.
        error: to stderr.
        end: what follows.
    """
    shown = printable(text, keep="\n\t" if lines else "")
    print(shown, end=end, file=sys.stderr if error else sys.stdout, flush=True)


class SteadyStream:
    """Wrap a text stream so that its writes do not fail; all its other attributes are the stream's own."""

    def __init__(self, stream: TextIO, *, warning: str = "") -> None:
        """Take over a stream.

        Args:
            stream: to write to.
            warning: for stderr when nobody reads `stream` any more or it cannot be written; empty: none.
        """
        self._stream, self._warning = stream, warning
        self.error: OSError | None = None
        "why output is lost that somebody wanted; None where the reader has left by its own choice"
        if isinstance(stream, io.TextIOWrapper):
            # a name may have letters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write what can be written, escaped; returns the length of the text, as print() expects."""
        try:
            self._stream.write(printable(text, keep=_KEPT))
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def drop(self) -> None:
        """Let all that is written from now on go nowhere, also what the interpreter flushes at its end.

        The descriptor itself is replaced: the interpreter flushes the original stream, past this object, and
        would print "Exception ignored ... BrokenPipeError" and exit with 120.
        """
        with contextlib.suppress(OSError, ValueError):
            target = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, target)
            os.close(null)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _lose(self, error: OSError | ValueError) -> None:
        """Note why output is lost, and warn once."""
        if isinstance(error, ValueError):
            # "I/O operation on closed file"
            error = OSError(errno.EBADF, str(error))
        if error.errno == errno.EPIPE:
            self.drop()
        elif self.error is None:
            self.error = error
        if self._warning:
            text, self._warning = f"{self._warning} ({error.strerror})", ""
            say(text, error=True)


if TYPE_CHECKING:
    # what print() and others are given, although it only forwards
    class _Steady(SteadyStream, TextIO): ...


@contextlib.contextmanager
def steady_output(warning: str = "") -> Iterator[SteadyStream]:
    """Make sys.stdout and sys.stderr steady, and give stdout; inside another one it changes nothing.

    Args:
        warning: for stderr, once, when stdout is lost; empty where output is all that is asked for.
    """
    if isinstance(sys.stdout, SteadyStream):
        yield sys.stdout
        return
    _open_missing()
    before = sys.stdout, sys.stderr
    stdout, stderr = SteadyStream(sys.stdout, warning=warning), SteadyStream(sys.stderr)
    sys.stdout, sys.stderr = cast("_Steady", stdout), cast("_Steady", stderr)
    try:
        yield stdout
    finally:
        for stream in (stdout, stderr):
            stream.flush()
            if stream.error is not None:
                stream.drop()
        sys.stdout, sys.stderr = before


def _open_missing() -> None:
    """Open /dev/null in place of a closed descriptor 0, 1 or 2.

    The next file to be opened would get the number, a checkpoint perhaps, and all prints would go into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # the lowest free one, which is this one
            os.open(os.devnull, os.O_RDWR)
    # Python has None for what was closed
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (lasts as the process does)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115

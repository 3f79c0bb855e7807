"""Standard output and error as all commands use them: losing one of them never ends what a command does.

A reader that leaves (`| head`), a full disk, a closed stream and a terminal without the letters of a name are
all survived; what a terminal would act on is escaped on its way, whatever printed it.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO, cast

from msa_train.config import printable

# A bar is drawn anew by \r.
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
    """A text stream whose writes do not fail; what else it is, is the stream's."""

    def __init__(self, stream: TextIO, *, warning: str = "") -> None:
        """warning: for stderr when nobody reads `stream` any more or it cannot be written; empty: none."""
        self._stream, self._warning = stream, warning
        self.error: OSError | None = None
        "why something is lost that somebody wanted: not where the reader has left"
        if isinstance(stream, io.TextIOWrapper):
            # a name may have letters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write what can be written."""
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
        """Let all that is written from now on go nowhere, also what the interpreter flushes at its end."""
        with contextlib.suppress(OSError, ValueError):
            target = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, target)
            os.close(null)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _lose(self, error: OSError | ValueError) -> None:
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
    """Make sys.stdout and sys.stderr steady; gives stdout. Inside another one it changes nothing.

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
    """A closed descriptor 1 would be that of the next file to be opened, a checkpoint perhaps."""
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

"""Ends a process that makes no step for too long, after writing down where all its threads stand."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from msa_train.config import printable

HUNG = 70
"exit code of a process that the watchdog ended"
# A thread of Python cannot run while another one keeps the interpreter; the one of faulthandler can.
_SPARE_S = 30
# for a process that is stuck, before those that wait for it
_HEAD_START_S = 3.0


class StalledError(RuntimeError):
    """A process made no progress for too long; never raised, only told."""


class Watchdog:
    """Watches a block of code that calls `beat` now and then.

    Example: with Watchdog(1800, "rank 3") as watchdog: ...; watchdog.beat("step 17 is made")
    """

    def __init__(
        self,
        timeout_s: float,
        name: str,
        *,
        stands_at: Callable[[], tuple[str, bool]] = lambda: ("", False),
        tell: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        """Watch from `__enter__` on.

        Args:
            timeout_s: longest time between two beats, 0: any.
            name: of this process in the message.
            stands_at: where it stands, and whether it only waits for others there; for the message.
            tell: hands the message to the launcher and to other processes.
        """
        self.timeout_s, self.name, self.stands_at, self.tell = timeout_s, name, stands_at, tell
        self._last, self._done = "the start", threading.Event()
        self._last_s = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat(self._last)
        if self.timeout_s > 0:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self.timeout_s > 0:
            faulthandler.cancel_dump_traceback_later()

    def beat(self, done: str) -> None:
        """Something is done, named in the message if nothing follows."""
        self._last, self._last_s = done, time.monotonic()
        if self.timeout_s > 0:
            faulthandler.dump_traceback_later(self.timeout_s + _SPARE_S, exit=True)

    def _watch(self) -> None:
        while not self._done.wait(max(self._last_s + self.timeout_s - time.monotonic(), 0.01)):
            silent_s = time.monotonic() - self._last_s
            if silent_s >= self.timeout_s:
                self._bark(silent_s)

    def _bark(self, silent_s: float) -> None:
        point, only_waits = self.stands_at()
        if only_waits:
            # who does not is to blame, and to be named first
            time.sleep(_HEAD_START_S)
        where = f", {point}" if point else ""
        text = f"{self.name}: no progress for {silent_s:.0f} s since {self._last}{where}"
        text += f" (watchdog.timeout_s={self.timeout_s:g})"
        print(
            printable(f"msa-train: {text}; its threads stand here, then it ends:"),
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        self.tell(StalledError(text))
        os._exit(HUNG)

"""Read the most memory that each worker of a run has had at any time, from outside."""

import contextlib
import threading
from pathlib import Path
from typing import Self

from benchmarks.machine import status_bytes

_EVERY_S = 1.0


class PeakMemory:
    """Watch the workers of a run, which are those with its folder's settings in their command line.

    Linux keeps the peak of a process (VmHWM) while it lives: what is read last, at most a second before its
    end, is its peak, for a step ends with less memory than its backward pass.
    """

    def __init__(self, run_dir: str) -> None:
        self._needle = f"{run_dir}/config.yaml".encode()
        self._peaks: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def gib(self) -> list[float]:
        """Return the peak of each worker, the largest first."""
        return sorted((size / 2**30 for size in self._peaks.values()), reverse=True)

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            for process in Path("/proc").glob("[0-9]*"):
                # it may end meanwhile
                with contextlib.suppress(OSError, ValueError):
                    if self._needle in (process / "cmdline").read_bytes():
                        self._peaks[process.name] = status_bytes("VmHWM", process)

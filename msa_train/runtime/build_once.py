"""Build something on a shared file system once: one process makes it, the others wait. Standard library only.

A lock is a file beside the target that its holder touches every few seconds. Whose lock stands still for
STALE_S, by the clock of who waits, is taken to be dead. So at worst two build at once, and whoever publishes
first wins: the target must appear whole, and be the same whoever makes it.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_TOUCH_S, STALE_S, _LOOK_S = 5.0, 60.0, 0.2


def build_once(target: Path, make: Callable[[], None]) -> None:
    """Return when `target` exists; make it unless another process does.

    256 processes that wait look at two names five times a second each.

    Args:
        target: a file or folder.
        make: makes it, whole or not at all.

    Raises:
        OSError: if the lock cannot be written, or what `make` raises.
    """
    lock = target.with_name(f"{target.name}.lock")
    seen, since = 0, time.monotonic()
    while not target.exists():
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        except FileExistsError:
            touched = _touched(lock)
            if touched != seen:
                seen, since = touched, time.monotonic()
            elif time.monotonic() - since > STALE_S:
                lock.unlink(missing_ok=True)
                since = time.monotonic()
            time.sleep(_LOOK_S)
            continue
        with _held(lock):
            if not target.exists():
                make()


def _touched(lock: Path) -> int:
    """Return when the lock was touched last, ns; 0 where there is none."""
    try:
        return lock.lstat().st_mtime_ns
    except OSError:
        return 0


@contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Touch the lock while the block runs, and remove it afterwards."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(_TOUCH_S):
            try:
                os.utime(lock, follow_symlinks=False)
            except OSError:
                # taken for dead and removed: two build now
                return

    thread = threading.Thread(target=touch, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lock.unlink(missing_ok=True)

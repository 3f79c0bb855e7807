"""Bound calls of libraries that take as long as a file from somebody else wants, given up after a time."""

import threading
from collections.abc import Callable
from typing import Any


def within(limit_s: float, call: Callable[[], Any]) -> Any:
    """Return the result of a call that lets other threads run; what it raises is raised here.

    A call that is given up goes on in a thread that keeps no process from ending: nothing can stop it.

    Args:
        limit_s: seconds that it may take.
        call: runs in a thread of its own.

    Raises:
        TimeoutError: without a message, if it takes longer.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        # a panic of a library in Rust is no Exception
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="limited", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]

"""What the commands beside msa-train share: parsing, and how a failure is told."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import NoReturn

# exit codes of all commands; STOPPED: saved before the end, to be started again (EX_TEMPFAIL of sysexits.h)
USER_ERROR, STOPPED, INTERRUPTED = 2, 75, 130


def leave(code: int) -> NoReturn:
    """End this process at once, everything printed.

    Python would first take apart all modules and objects: a second of work after torch was imported, in which
    destructors of process groups can wait for other ranks for ever.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def number(text: str) -> float:
    """The `type` of an option with a number: what is not finite would turn comparisons round."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


class Parser(argparse.ArgumentParser):
    """Bad arguments raise ValueError, so that `run_command` tells them like all other bad input."""

    def error(self, message: str) -> NoReturn:
        """See argparse."""
        raise ValueError(f"{message}; see {self.prog.split()[0]} --help")


def run_command(name: str, run: Callable[[], int | None], *, when_interrupted: str = "") -> int:
    """Run a command; bad input or files become one line on stderr.

    Args:
        name: the command's.
        run: does the work; returns another exit code than 0 where there is one.
        when_interrupted: what to add after Ctrl-C.

    Returns:
        Exit code: 0 or what `run` returns, 2 for bad input or files, 130 if interrupted.
    """
    try:
        return run() or 0
    except BrokenPipeError:
        # `... | head`; the interpreter must not try to flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{name}: stopped by SIGINT{when_interrupted}", file=sys.stderr)
        return INTERRUPTED

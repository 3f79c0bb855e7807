"""Parse arguments and tell failures in the same way in every command; exit codes are defined here.

A failure of the user's is one line on stderr, `COMMAND: error: NAME=VALUE: RULE; FIX`, and exit code 2.
"""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from launchers.cli.output import say, steady_output
from launchers.local.machine import check_current_folder
from msa_train.config import one_line

# exit codes of all commands; STOPPED: saved before the end, to be started again (EX_TEMPFAIL of sysexits.h)
MACHINE_ERROR, USER_ERROR, STOPPED, INTERRUPTED = 1, 2, 75, 130
# of workers alone: all of them have saved and ended for those of the next stage
NEXT_STAGE = 76


def leave(code: int) -> NoReturn:
    """End this process at once, everything printed.

    Python would first take apart all modules and objects: a second of work after torch was imported, in which
    destructors of process groups can wait for other ranks for ever.
    """
    for stream in (sys.stdout, sys.stderr):
        # what can no longer be printed must not change the code
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def number(text: str) -> float:
    """Read the number of an option; the `type` of argparse.

    NaN is refused, for every comparison with it is false: --tolerance nan would find all tensors equal.

    Raises:
        argparse.ArgumentTypeError, ValueError: if it is no finite number; argparse tells both alike.
    """
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


class Parser(argparse.ArgumentParser):
    """Raise ValueError for bad arguments, so that `run_command` tells them like all other bad input."""

    def error(self, message: str) -> NoReturn:
        """Raise in place of printing the usage and ending the process."""
        raise ValueError(f"{message}; see {self.prog.split()[0]} --help")


def run_command(name: str, run: Callable[[], int | None], *, when_interrupted: str = "") -> int:
    """Run a command; bad input or files become one line on stderr.

    Args:
        name: of the command, which begins every line on stderr.
        run: does the work; returns another exit code than 0 where there is one.
        when_interrupted: what to add after Ctrl-C.

    Returns:
        Exit code: 0 or what `run` returns, 1 if stdout could not be written, 2 for bad input or files, 130 if
        interrupted. A reader of stdout that leaves, as in `| head`, changes nothing.
    """
    with steady_output() as output:
        code = _run(name, run, when_interrupted)
        output.flush()
        if output.error is not None and not code:
            say(f"{name}: error: stdout cannot be written ({output.error.strerror})", error=True)
            return MACHINE_ERROR
        return code


def _run(name: str, run: Callable[[], int | None], when_interrupted: str) -> int:
    """Turn what is raised into one line on stderr and an exit code."""
    try:
        check_current_folder()
        return run() or 0
    except (ValueError, OSError) as error:
        say(f"{name}: error: {one_line(error)}", error=True)
        return USER_ERROR
    except KeyboardInterrupt:
        say(f"{name}: stopped by SIGINT{when_interrupted}", error=True)
        return INTERRUPTED

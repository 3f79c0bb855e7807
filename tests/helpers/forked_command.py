"""The msa-train command, forked with its workers from a process that has imported torch and Megatron.

As programs they spend nearly all of a small run on imports. What differs is how they start: search path,
terminal, signals that come too early. Tests of that start the program.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.helpers import fork_server

POLL_S = 0.005


class ForkedCommand:
    """A running command; it has what tests need of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        environ: Mapping[str, str],
        stdout: str,
        stderr: str,
        module: str = "launchers.train",
    ) -> None:
        """stdout, stderr: names of files; module: of the command."""
        self._process = fork_server.context().Process(
            target=_run_command,
            args=(tuple(arguments), str(cwd), dict(environ), stdout, stderr, module),
            daemon=True,
        )
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Wait for the end; returns the exit code, minus the signal that ended it."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("msa-train", timeout)
        return code

    def send_signal(self, number: int) -> None:
        """Send it while the command runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


class _Worker:
    """A forked worker; it has what the agent needs of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _run_command(
    arguments: tuple[str, ...], cwd: str, environ: dict[str, str], stdout: str, stderr: str, module: str
) -> None:
    fork_server.take_over(environ)
    os.chdir(cwd)
    _redirect(os.open(stdout, os.O_WRONLY | os.O_APPEND), os.open(stderr, os.O_WRONLY | os.O_APPEND))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["msa-train", *arguments]
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (
        SubprocessHandler,
    )

    command = importlib.import_module(module).command
    started: Any = SubprocessHandler
    started._popen = _fork_worker
    command()


def _fork_worker(handler: Any, program: tuple[str, ...], environ: dict[str, str]) -> _Worker:
    """Take the place of `SubprocessHandler._popen`."""
    from launchers.local.code_path import worker_arguments

    arguments = program[1 + len(worker_arguments()) :]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        try:
            _run_worker(arguments, environ, handler._stdout, handler._stderr)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    return _Worker(pid)


def _run_worker(arguments: tuple[str, ...], environ: dict[str, str], stdout: Any, stderr: Any) -> None:
    os.setsid()
    fork_server.take_over(environ)
    _redirect(stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2)
    # what `ps` shows of it: its arguments and environment are still those of the server
    Path("/proc/self/comm").write_text(worker_name(int(environ["RANK"])))
    # read by OpenMP when torch is imported
    torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    from launchers.worker import main

    main(arguments)


def worker_name(rank: int) -> str:
    """The name of a forked worker's process."""
    return f"rank{rank}"


def _redirect(stdout: int, stderr: int) -> None:
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (lasts as the process does)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115

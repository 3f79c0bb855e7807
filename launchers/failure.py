"""Which worker failed first, and what to tell the user about it."""

import os
import re
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# What a rank raises because another one is gone, rather than of its own
SECONDARY = re.compile(
    r"connection (closed|reset|refused|was closed)|broken pipe|socket (closed|timeout)"
    # not the name of a setting, as in launcher.timeout_s
    r"|timed out|timeout(?!_s)|remote process exited|peer closed"
    r"|communicator (was|is) aborted|ncclRemoteError|ncclSystemError"
    r"|read error|write error|DistStoreError|DistNetworkError|recvValue failed|failed to (recv|send)"
    r"|lost the others|no answer from the job's store|waiting for other ranks|did not come within",
    re.IGNORECASE,
)
LOG_TAIL_LINES = 30
# A hard end is noticed by polling, after ranks that hear of it through a closed connection
NOTICED_LATE_S = 1.0
# less than this and a traceback may not fit
_ROOM_BYTES = 2**16


@dataclass(kw_only=True, slots=True)
class WorkerFailure:
    """End of one worker."""

    rank: int
    pid: int
    exit_code: int
    "negative: the number of the signal that ended it"
    time_s: float
    "when it raised, or else when its end was noticed"
    error: str
    "type and text of its exception, empty where it recorded none"
    traceback: str
    ended_by_launcher: bool
    "when the job was taken down because of another worker"
    log: Path | None
    "its stderr, None where that is the terminal"


def first_failure(failures: Mapping[int, WorkerFailure]) -> WorkerFailure:
    """The failure that caused the others.

    Args:
        failures: by rank.

    Example: rank 1 ended by SIGKILL, rank 0 raised "Connection closed by peer" -> rank 1.
    """

    def order(failure: WorkerFailure) -> tuple[bool, bool, float]:
        secondary = bool(failure.error and SECONDARY.search(failure.error))
        time_s = failure.time_s if failure.error else failure.time_s - NOTICED_LATE_S
        return failure.ended_by_launcher and not failure.error, secondary, time_s

    return min(failures.values(), key=order)


def report(
    failures: Mapping[int, WorkerFailure],
    *,
    world_size: int,
    first_rank: int = 0,
    log_folder: Path | None = None,
) -> str:
    """Text for the terminal: rank, cause, traceback, and how the others ended.

    Args:
        failures: by rank.
        world_size: ranks of the job.
        first_rank: the first one on this machine.
        log_folder: where workers write to.
    """
    first = first_failure(failures)
    lines = [
        f"msa-train: rank {first.rank} of {world_size} failed: {_cause(first)}",
        f"  rank {first.rank}, local rank {first.rank - first_rank}, pid {first.pid}, "
        f"host {socket.gethostname()}, {_ending(first.exit_code)}",
    ]
    if first.log:
        lines.append(f"  its output: {first.log}")
    for rank in sorted(failures):
        if failures[rank] is not first:
            lines.append(f"  afterwards rank {rank}: {_afterwards(failures[rank])}")
    return "\n".join(lines) + "\n" + _details(first, log_folder)


def _cause(failure: WorkerFailure) -> str:
    if not failure.error:
        return _ending(failure.exit_code)
    line = failure.error.strip().splitlines()[0]
    return line if len(line) <= 240 else f"{line[:237]}..."


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = " (often the system's out-of-memory killer: see dmesg)" if name == "SIGKILL" else ""
    return f"ended by {name}{hint}"


def _afterwards(failure: WorkerFailure) -> str:
    if failure.error or not failure.ended_by_launcher:
        return _cause(failure)
    if failure.exit_code == -signal.SIGKILL:
        return "did not answer and was killed by the launcher"
    return "stopped by the launcher"


def _details(first: WorkerFailure, log_folder: Path | None) -> str:
    if first.traceback:
        return first.traceback.rstrip()
    if first.log and first.log.is_file():
        tail = first.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        if tail:
            return "the last lines it wrote:\n" + "\n".join(tail)
    return f"it left no traceback{_full_disk(log_folder)}"


def _full_disk(folder: Path | None) -> str:
    """Why there may be no traceback: what a worker would have written to has no room for it."""
    if folder is None:
        return ""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return ""
    is_full = disk.f_bavail * disk.f_frsize < _ROOM_BYTES or (disk.f_files and not disk.f_favail)
    return f"; the disk of {folder} is full" if is_full else ""

"""Ask a run to stop after the step it is in. Standard library only: read before torch is imported.

SIGUSR1 says that the time is nearly up, SIGTERM that the place is wanted for something else. Either only
leaves a note here; the training loop looks at it after every step, saves and ends.
"""

import json
import signal
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType

from msa_train.runtime.atomic_files import new_file
from msa_train.runtime.untrusted_files import read_record

STOPPED_NAME = "stopped.json"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_requested = 0


@dataclass(kw_only=True, slots=True)
class StopRecord:
    """Record why and where a run stopped before its end: content of run_dir/stopped.json."""

    step: int
    "optimizer steps made"
    signal: str
    "name of the signal, e.g. SIGUSR1"
    saved: bool
    "there is a checkpoint of this step, so that another start goes on from there"
    generation: str
    "fencing token of the start that stopped; empty where it had none"


def install_handlers(*signals: signal.Signals) -> None:
    """Note these signals, by default all of SIGNALS, in place of what they do otherwise; main thread only."""
    for number in signals or SIGNALS:
        signal.signal(number, _note)
        # a system call that is under way, such as a write of a checkpoint, goes on
        signal.siginterrupt(number, False)


def ignore() -> None:
    """Ignore the signals: nothing is left to stop, and a late one must not turn a good end into a bad one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def signal_received() -> int:
    """Return the number of the first signal that asked this process to stop, 0 if none has."""
    return _requested


def signal_name(number: int) -> str:
    """Name a signal: 10 -> "SIGUSR1"."""
    return signal.Signals(number).name


def write_stopped(run_dir: str | Path, stopped: StopRecord) -> None:
    """Leave the mark that another start shall go on; it appears whole or not at all."""
    path = Path(run_dir) / STOPPED_NAME
    text = json.dumps({**asdict(stopped), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    with new_file(path) as file:
        file.write(text + "\n")


def read_stopped(run_dir: str | Path) -> StopRecord | None:
    """Read the mark of the last start, None if that did not stop early.

    Raises:
        ValueError: one line, if the file is damaged.
    """
    path = Path(run_dir) / STOPPED_NAME
    try:
        content = read_record(path, {field.name: field.type for field in fields(StopRecord)})
    except FileNotFoundError:
        return None
    # no signal of that name: nothing of ours wrote it
    if content["signal"] not in signal.Signals.__members__:
        raise ValueError(f"{path}: is damaged; remove it")
    return StopRecord(**content)


def clear_stopped(run_dir: str | Path) -> None:
    """Remove the mark of an earlier start."""
    (Path(run_dir) / STOPPED_NAME).unlink(missing_ok=True)


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    # the first signal counts: a SIGTERM that follows does not change why the run stops
    _requested = _requested or number

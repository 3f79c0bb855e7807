"""Write metrics.jsonl and TensorBoard's files. Rank 0 only.

A value is a number, a dict of named numbers or a dict by layer, {"layer03": entry}. An entry is a number, a
list with a number for each KV group or a dict of named numbers. Layers count from 1, groups from 0. The keys
are those of `registry`.
"""

import json
import math
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msa_train.runtime.atomic_files import is_full, new_file, open_to_append
from msa_train.training.metrics.registry import with_present_keys
from msa_train.training.metrics.tensorboard import CHARTS, scalars

METRICS_NAME, TENSORBOARD_NAME = "metrics.jsonl", "tensorboard"


# of lines that wait for space on the disk; what comes after these is not kept
_MAX_WAITING_BYTES = 2**26
# written steps after which a TensorBoard file that could not be written is followed by another
_TRY_AGAIN_AFTER = 100


class MetricsWriter:
    """Append to the metrics of a run, after dropping what a killed run wrote beyond its last checkpoint.

    A full disk does not end a run: lines wait in memory until they can be written, and TensorBoard's points
    are left out until then.
    """

    def __init__(self, run_dir: str | Path, *, tensorboard: bool, resume_step: int) -> None:
        folder = Path(run_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._with_tensorboard = folder, tensorboard
        self._waiting, self._writes, self._try_again = b"", 0, 0
        # Of the first line that waits: what is written already. A line must not be written twice, nor lost.
        self._cut = b""
        self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        """Open both files for what follows `resume_step`; later lines, and points, are dropped."""
        path = self._folder / METRICS_NAME
        if path.exists():
            _drop_after(path, resume_step)
        self._file, self._tensorboard = open_to_append(path), None
        if self._with_tensorboard:
            self._tensorboard: Any = self._new_tensorboard(resume_step + 1)

    def _new_tensorboard(self, first_step: int) -> Any:
        """Begin a TensorBoard file; points of earlier files from `first_step` on are no longer shown."""
        # takes seconds to import
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _quiet_about_disks
        writer = SummaryWriter(
            str(self._folder / TENSORBOARD_NAME),
            purge_step=first_step,
            # a name that nobody can have placed a link under
            filename_suffix=f".{secrets.token_hex(8)}",
        )
        writer.add_custom_scalars(CHARTS)
        return writer

    def go_back(self, step: int) -> list[str]:
        """Drop what comes after a step, from which the run goes on in another way; on a full disk too.

        Returns:
            As `write`.
        """
        self._flush()
        lines = (self._cut + self._waiting).splitlines(keepends=True)
        if self._cut:
            os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - len(self._cut))
        self._cut = b""
        self._waiting = b"".join(line for line in lines if json.loads(line)["step"] <= step)
        self._close_files()
        try:
            self._open(step)
        except OSError as error:
            if not is_full(error) or self._file.closed:
                raise
            return [self._without_points(step, error)]
        return []

    def write(self, step: int, values: Mapping[str, Any]) -> list[str]:
        """Add one step.

        Args:
            step: optimizer steps made; greater than in earlier calls.
            values: numbers and dicts by key, see the module. Not-a-number and infinity become null in
                metrics.jsonl and their names are listed under "nonfinite".

        Returns:
            What to tell the user: where something could not be written, and where it can be again.
        """
        self._writes += 1
        return [*self._write_line(step, values), *self._write_points(step, values)]

    def _write_line(self, step: int, values: Mapping[str, Any]) -> list[str]:
        """Append a line to metrics.jsonl, after those that wait."""
        plain, nonfinite = json_ready(values)
        line = {"step": step, **plain, **({"nonfinite": nonfinite} if nonfinite else {})}
        had_to_wait = bool(self._waiting)
        if len(self._waiting) < _MAX_WAITING_BYTES:
            self._waiting += json.dumps(line, allow_nan=False).encode() + b"\n"
        error = self._flush()
        if error is not None:
            path = self._folder / METRICS_NAME
            later = "training goes on, and they are written when they can be"
            return [] if had_to_wait else [f"step {step}: {path}: {error.strerror}; {later}"]
        return [f"step {step}: {METRICS_NAME} is written again"] if had_to_wait else []

    def _flush(self) -> OSError | None:
        """Write what waits, as much as there is room for; says what kept it."""
        try:
            while self._waiting:
                # no buffer between: a line that is cut off goes on where it was cut
                count = os.write(self._file.fileno(), self._waiting)
                written, self._waiting = self._cut + self._waiting[:count], self._waiting[count:]
                self._cut = written[written.rfind(b"\n") + 1 :]
        except OSError as error:
            return error
        return None

    def _write_points(self, step: int, values: Mapping[str, Any]) -> list[str]:
        """Add a step's points to TensorBoard's file, or to a new one a while after a failure."""
        if not self._with_tensorboard or (self._tensorboard is None and self._writes < self._try_again):
            return []
        is_new = self._tensorboard is None
        try:
            writer = self._tensorboard = self._tensorboard or self._new_tensorboard(step)
            for key, value in values.items():
                for tag, number in scalars(key, value):
                    writer.add_scalar(tag, number, step)
            # a kill -9 must not cost points that the checkpoint already covers
            writer.flush()
        except OSError as error:
            text = self._without_points(step, error)
            return [] if is_new else [text]
        return [f"step {step}: {TENSORBOARD_NAME} is written again"] if is_new else []

    def _without_points(self, step: int, error: OSError) -> str:
        """Give up TensorBoard's file for a while; return what to say."""
        # its thread has ended, so this file is over
        self._tensorboard, self._try_again = None, self._writes + _TRY_AGAIN_AFTER
        path, left = self._folder / TENSORBOARD_NAME, f"its points are left out, {METRICS_NAME} has them"
        return f"step {step}: {path}: {error.strerror}; {left}"

    def close(self) -> None:
        """Finish both files, as far as the disk allows."""
        self._flush()
        self._close_files()

    def _close_files(self) -> None:
        """Close both files, whatever the disk says."""
        self._file.close()
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
        except OSError:
            pass


def _quiet_about_disks(thread: threading.ExceptHookArgs) -> None:
    """Leave out the traceback of TensorBoard's thread where it cannot write; `write` says that in a line."""
    if not (isinstance(thread.exc_value, OSError) and type(thread.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(thread)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the steps of a metrics.jsonl (or of the run_dir that holds it), under the keys of this version.

    Lines cut short by a kill are left out.

    Raises:
        OSError: if it cannot be read.
    """
    path = Path(path)
    return [with_present_keys(entry) for _, entry in _entries(path / METRICS_NAME if path.is_dir() else path)]


def json_ready(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Make values plain JSON; return them and the keys under which a number was not finite (and is null).

    Example: {"lm_loss": nan, "lr": 0.1} -> {"lm_loss": None, "lr": 0.1} and ["lm_loss"].
    """
    plain = {key: _plain(value) for key, value in values.items()}
    return plain, [key for key, value in values.items() if not _is_finite(value)]


def _plain(value: Any) -> Any:
    """Make a value plain JSON, numbers that are not finite null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    # also the scalars of NumPy and torch
    number = value.item() if hasattr(value, "item") else float(value)
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _is_finite(value: Any) -> bool:
    """Tell whether all numbers in a value are finite."""
    if isinstance(value, Mapping):
        return all(_is_finite(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return all(_is_finite(entry) for entry in value)
    return value is None or isinstance(value, str) or math.isfinite(value)


def _drop_after(path: Path, resume_step: int) -> None:
    """Keep whole lines up to resume_step; the file is replaced at once, or cut where two have no room."""
    try:
        with new_file(path) as file:
            for line, entry in _entries(path):
                if entry["step"] <= resume_step:
                    file.write(line + "\n")
    except OSError as error:
        if not is_full(error):
            raise
        _cut_after(path, resume_step)


def _cut_after(path: Path, resume_step: int) -> None:
    """Do as `_drop_after`, without room on the disk; damaged lines stay, which readers leave out."""
    end = place = 0
    with path.open("rb") as lines:
        for line in lines:
            place += len(line)
            if line.endswith(b"\n") and any(
                entry["step"] <= resume_step for entry in _parsed(line.decode(errors="replace"))
            ):
                end = place
    with open_to_append(path) as file:
        file.truncate(end)


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of metrics.jsonl that can be understood, each with its entry."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            for entry in _parsed(line):
                yield line.rstrip("\n"), entry


def _parsed(line: str) -> list[dict[str, Any]]:
    """Parse a line: its entry, or none where it is damaged."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return []
    return [entry] if isinstance(entry, dict) and isinstance(entry.get("step"), int) else []

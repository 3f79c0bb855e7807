"""Start the children of a run, watch them, and go on where one ended badly.

An illegal access ends every later call of the process that made it, and a kernel may never end. So each part
runs in a process of its own, which writes down what it begins and ends; where it dies or hangs, what it had
begun is given up and another process goes on with the rest of the part.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import PartSpec
from benchmarks.gpu.records import CRASHED, LEFT_OUT, Record, Records

ROOT = Path(__file__).resolve().parents[2]
# Imports, and the device's first call
START_LIMIT_S = 120.0
# After being asked to end
_GRACE_S = 3.0
_POLL_S = 0.02
# Processes in a row that end before they have begun a step
_MOST_EMPTY = 2


@dataclass(slots=True)
class _Child:
    part: PartSpec
    process: subprocess.Popen[bytes]
    since: float
    """Of the last sign of life, on the monotonic clock."""
    step: str | None = None
    """Begun and not over."""
    begun: int = 0
    """Steps begun by this process."""
    hung: bool = False


@dataclass(slots=True)
class Supervisor:
    """Run parts, one after the other or side by side."""

    records: Records
    logs: Path
    command: list[str]
    """Of a child."""
    job_of: Callable[[PartSpec, list[str]], dict[str, Any]]
    """Job of a child that makes this part without these steps; `log`, where it prints to, is added."""
    environment: dict[str, str]
    on_record: Callable[[Record], None]
    """Is told of every new record."""
    deadline: float
    """Of the monotonic clock: then all children are ended."""
    most_at_once: int = 1
    _seen: int = 0
    """Records, and bytes of the file."""
    _size: int = 0
    _ended: dict[str, list[str]] = field(default_factory=dict)
    """Steps of each part that are over, in this run."""
    _children: list[_Child] = field(default_factory=list)
    _spare: subprocess.Popen[bytes] | None = None
    _empty: dict[str, int] = field(default_factory=dict)

    def run(self, parts: list[PartSpec], ended: dict[str, list[str]]) -> bool:
        """Make all parts; returns whether all of them came to their end.

        Args:
            parts: those that may run beside others first, and together.
            ended: steps of earlier calls that are not made again, by part.
        """
        self._ended = {part.name: list(ended.get(part.name, [])) for part in parts}
        self._seen = len(self.records.read())
        together = [part for part in parts if part.beside_others]
        try:
            complete = self._run(together, self.most_at_once)
            return self._run([part for part in parts if not part.beside_others], 1) and complete
        finally:
            self.stop()

    def stop(self) -> None:
        """End all children and what they have started, and take in what they have written."""
        for child in self._children:
            _signal(child, signal.SIGTERM)
        until = time.monotonic() + _GRACE_S
        while any(child.process.poll() is None for child in self._children) and time.monotonic() < until:
            time.sleep(_POLL_S)
        for child in self._children:
            _signal(child, signal.SIGKILL)
            child.process.wait()
        self._read()
        for child in self._children:
            if child.step is not None:
                self._end(child, LEFT_OUT, "the run was ended")
        self._children = []
        if self._spare is not None:
            self._spare.kill()
            self._spare.wait()
            self._spare = None
        self._read()

    def _run(self, parts: list[PartSpec], at_once: int) -> bool:
        waiting, complete = list(parts), True
        while waiting or self._children:
            while waiting and len(self._children) < at_once:
                part = waiting.pop(0)
                if self._left_s > part.reserve_s:
                    self._start(part, more=bool(waiting) or part.beside_others)
                else:
                    self.records.append("note", text=f"{part.name}: left out, the time is up")
                    complete = False
            time.sleep(_POLL_S)
            self._read()
            for child in list(self._children):
                self._watch(child)
                if child.process.poll() is not None:
                    again, well = self._over(child)
                    complete &= well
                    if again:
                        waiting.insert(0, child.part)
            if self._left_s < -_GRACE_S:
                # children look at the time themselves before each step: these are late
                complete = complete and not self._children
                self.stop()
        return complete

    @property
    def _left_s(self) -> float:
        return self.deadline - time.monotonic()

    def _start(self, part: PartSpec, *, more: bool) -> None:
        process = self._spare or self._spawn()
        self._spare = None
        job = self.job_of(part, self._ended[part.name]) | {"log": str(self._log(part))}
        assert process.stdin is not None, "spawned with one"
        # a child that has died already is found by whoever watches it
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.close()
        self._children.append(_Child(part, process, time.monotonic()))
        if more:
            self._spare = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with (self.logs / "standby.log").open("a") as log:
            return subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdin=subprocess.PIPE, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _log(self, part: PartSpec) -> Path:
        return self.logs / f"{part.name}.log"

    def _read(self) -> None:
        """Take in new records: signs of life of the children, and results."""
        if self.records.size == self._size:
            return
        self._size, records = self.records.size, self.records.read()
        for record in records[self._seen :]:
            for child in self._children:
                if record.get("part") == child.part.name:
                    self._note_life(child, record)
            self.on_record(record)
        self._seen = len(records)

    def _note_life(self, child: _Child, record: Record) -> None:
        child.since = time.monotonic()
        if record["kind"] == "begin":
            child.step, child.begun = record["step"], child.begun + 1
        elif record["kind"] == "end":
            child.step = None
            self._ended[child.part.name].append(record["step"])

    def _watch(self, child: _Child) -> None:
        limit_s = child.part.limit_s if child.step is not None else START_LIMIT_S
        if time.monotonic() - child.since > limit_s and child.process.poll() is None:
            child.hung = True
            _signal(child, signal.SIGKILL)

    def _over(self, child: _Child) -> tuple[bool, bool]:
        """Return whether the part goes on in another process, and whether this one ended well."""
        child.process.wait()
        # all of its output first: it may have ended a step with its last breath
        self._read()
        self._children.remove(child)
        code = child.process.returncode
        if code == 0:
            return False, True
        why = self._why(child, code)
        if child.step is not None:
            self._ended[child.part.name].append(child.step)
            self._end(child, CRASHED, why)
        if child.begun:
            self._empty[child.part.name] = 0
            return True, child.step is None
        self._empty[child.part.name] = self._empty.get(child.part.name, 0) + 1
        again = self._empty[child.part.name] < _MOST_EMPTY
        if not again:
            self.records.append("note", text=f"{child.part.name}: not begun, {why}")
            self._read()
        return again, False

    def _end(self, child: _Child, status: str, why: str) -> None:
        self.records.append("end", part=child.part.name, step=child.step, status=status, why=why)

    def _why(self, child: _Child, code: int) -> str:
        text = f"no end after {child.part.limit_s:.0f} s" if child.hung else _describe(code)
        log = self._log(child.part) if self._log(child.part).exists() else self.logs / "standby.log"
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return f"{text}; {log.name}: {last[0].strip()[:200]}" if last and not child.hung else text


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def _signal(child: _Child, number: signal.Signals) -> None:
    """Signal the whole group of a child's processes, also where the child itself is gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, number)


def child_environment(device: str, kernel: str) -> dict[str, str]:
    """Return the environment of all children; on the CPU Triton's kernels are interpreted."""
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
    if device == "cpu" and kernel == "triton":
        # before the first kernel is imported
        changes["TRITON_INTERPRET"] = "1"
    return os.environ | changes

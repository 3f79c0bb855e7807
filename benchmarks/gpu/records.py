"""Write the file of a run as it goes: one JSON object per line, whole or not there.

Kinds of records, by the field `kind`:
    run     one start of the command: facts of the machine, settings
    begin   a step of a part is begun; end: it is over, with a status and why
    part    all steps of a part are over
    rates, check, row, dense, note: what was found, fields as in `rows.py`
"""

import json
import math
import os
from pathlib import Path
from typing import Any

NAME = "records.jsonl"
# How a step ended.
DONE, FAILED, LEFT_OUT, CRASHED = "done", "failed", "left out", "crashed"
Record = dict[str, Any]


class Records:
    """Append to and read from the records of one output folder; any number of processes at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def append(self, kind: str, **fields: Any) -> Record:
        """Write one record; it is in the file when this returns, whatever becomes of the process."""
        record = without_nan({"kind": kind, **fields})
        line = json.dumps(record).encode() + b"\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            # a writer that was killed may have left half a line
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            # one write of an appending descriptor: lines of several processes do not mix
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
        return record

    def read(self) -> list[Record]:
        """Return all whole records, oldest first."""
        if not self.path.exists():
            return []
        return [record for line in self.path.read_bytes().split(b"\n") if (record := _parse(line))]

    @property
    def size(self) -> int:
        """Count the bytes so far: they tell whether there is anything new."""
        return self.path.stat().st_size if self.path.exists() else 0


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def without_nan(value: Any) -> Any:
    """Return the same values with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

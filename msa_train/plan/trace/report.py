"""Hold what a trace found, as plain data."""

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

from msa_train.plan.trace.storage_tracker import Entry, Peak, StorageTracker

_LINES = 25


@dataclass(kw_only=True, slots=True)
class Line:
    """Hold what one source line had alive."""

    place: str
    "source lines, innermost first"
    part: str
    "part of the step"
    shape: tuple[int, ...]
    "of each tensor"
    dtype: str
    "of each tensor"
    count: int
    "tensors"
    num_bytes: int
    "of all of them"


@dataclass(kw_only=True, slots=True)
class Alive:
    """Hold what was alive at a peak."""

    num_bytes: int
    "all of it"
    by_part: dict[str, int]
    "bytes by part"
    lines: list[Line]
    "largest first"


@dataclass(kw_only=True, slots=True)
class TraceReport:
    """Hold the figures of one rank; bytes of tensors, without any margin."""

    static: dict[str, int]
    "bytes between steps: weights, gradients, optimizer"
    static_bytes: int
    "bytes between steps"
    step: Alive
    "at the peak of a step, device"
    save: Alive | None
    "at the peak of a save, device; None: not traced"
    save_host: Alive | None
    "at the peak of a save, host"
    seconds: dict[str, float] = field(default_factory=dict)
    "what the trace itself took"

    @property
    def peak_bytes(self) -> int:
        """Give the largest peak of the device."""
        return max(self.step.num_bytes, self.save.num_bytes if self.save else 0)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return asdict(self) | {"peak_bytes": self.peak_bytes}


def make_report(
    device: StorageTracker, *, static: Peak, step: Peak, with_save: bool, seconds: dict[str, float]
) -> TraceReport:
    """Make the report from the tracker's peaks; the save's are those that it holds now."""
    return TraceReport(
        static=by_part(static.entries),
        static_bytes=static.num_bytes,
        step=alive(step),
        save=alive(device.peak) if with_save else None,
        save_host=alive(device.host_peak) if with_save else None,
        seconds=seconds,
    )


def by_part(entries: list[Entry]) -> dict[str, int]:
    """Sum bytes by part, largest first."""
    sums: dict[str, int] = defaultdict(int)
    for entry in entries:
        sums[entry.part] += entry.num_bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def alive(peak: Peak, most: int = _LINES) -> Alive:
    """List what was alive at a peak."""
    found: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
    for entry in peak.entries:
        counted = found[(entry.place, entry.part, entry.shape, entry.dtype)]
        counted[0] += 1
        counted[1] += entry.num_bytes
    lines = [
        Line(place=key[0], part=key[1], shape=key[2], dtype=key[3], count=count, num_bytes=size)
        for key, (count, size) in found.items()
        if key[0]
    ]
    return Alive(
        num_bytes=peak.num_bytes,
        by_part=by_part(peak.entries),
        lines=sorted(lines, key=lambda line: -line.num_bytes)[:most],
    )

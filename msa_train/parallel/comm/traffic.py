"""Count bytes and messages of collectives, and the time the device waited for them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Traffic:
    """Count the bytes that this rank received from other ranks."""

    received: dict[str, int] = field(default_factory=dict)
    "bytes by purpose (`kv`, `kv_grad`, `index_key`, ...)"

    def add(self, purpose: str, num_bytes: int) -> None:
        """Count `num_bytes` more."""
        self.received[purpose] = self.received.get(purpose, 0) + num_bytes

    def __getitem__(self, purpose: str) -> int:
        return self.received.get(purpose, 0)


@dataclass(slots=True)
class ExposedTime:
    """Count the time in which this rank could only wait for a collective, by purpose.

    On a CPU the time spent in `Pending.wait`. On a GPU the time for which its stream stood still, from events
    that nobody waits for before the step ends.
    """

    waited_s: dict[str, float] = field(default_factory=dict)
    "seconds by purpose; on a GPU those of events already read"
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    "purpose, begin and end of waits on a GPU"

    def seconds(self) -> dict[str, float]:
        """Give the seconds so far by purpose; on a GPU waits for what has been launched."""
        # Read when the step has ended, for reading an event makes the host wait for it.
        for purpose, begin, end in self.events:
            end.synchronize()
            self._add(purpose, begin.elapsed_time(end) / 1000)
        self.events.clear()
        return self.waited_s

    def run(self, purpose: str, device: torch.device, wait: Callable[[], None]) -> None:
        """Call `wait` and count how long it held this rank up."""
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # `wait` only makes the stream wait; the time between both events is what it stood still.
            begin.record()
            wait()
            end.record()
            self.events.append((purpose, begin, end))
            return
        begin_s = time.perf_counter()
        wait()
        self._add(purpose, time.perf_counter() - begin_s)

    def _add(self, purpose: str, seconds: float) -> None:
        self.waited_s[purpose] = self.waited_s.get(purpose, 0.0) + seconds


@dataclass(slots=True)
class CommCounters:
    """Hold figures that the collectives of one step leave behind."""

    traffic: Traffic = field(default_factory=Traffic)
    "bytes received"
    exposed: ExposedTime = field(default_factory=ExposedTime)
    "time waited"
    bad_values: list[str] = field(default_factory=list)
    "where keys or values were not finite, one line each"

"""Fit rates of links between ranks to measurements: start-up time and bandwidth."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass(slots=True, frozen=True)
class Line:
    """Estimate a collective's seconds as latency_s + num_bytes * s_per_byte."""

    latency_s: float
    "seconds that it takes however little is moved"
    s_per_byte: float
    "seconds for each byte of the busiest rank"

    def seconds(self, num_bytes: float) -> float:
        """Estimate the seconds of a collective in which the busiest rank moves `num_bytes`; 0 for none."""
        # No bytes, no collective: a scheme without broadcast blocks has no such steps.
        return self.latency_s + num_bytes * self.s_per_byte if num_bytes else 0.0


def fit_line(num_bytes: Sequence[float], seconds: Sequence[float]) -> Line:
    """Draw the line through a short and a long measurement, neither part negative.

    Example: 0 bytes in 1 ms and 1 MB in 3 ms -> latency 1 ms, 2 ns per byte.
    """
    (x0, y0), (x1, y1) = (num_bytes[0], seconds[0]), (num_bytes[-1], seconds[-1])
    slope = max(0.0, (y1 - y0) / (x1 - x0))
    return Line(max(0.0, y0 - slope * x0), slope)


@dataclass(slots=True, frozen=True)
class ExchangeRates:
    """Hold rates that were measured on the ranks between which KV blocks travel."""

    all_to_all: Line
    "between all of them"
    all_gather: Line
    "between all of them"
    reduce_scatter: Line
    "between all of them"
    inner: Line
    "all-to-all within a node; zeros without nodes"
    outer: Line
    "all-to-all between nodes; zeros without nodes"

    def flat(self) -> list[float]:
        """List the ten numbers, for the wire."""
        return [x for line in astuple(self) for x in line]

    @classmethod
    def from_flat(cls, values: Sequence[float]) -> "ExchangeRates":
        """Make rates of what `flat` listed."""
        return cls(*(Line(a, b) for a, b in zip(values[::2], values[1::2], strict=True)))

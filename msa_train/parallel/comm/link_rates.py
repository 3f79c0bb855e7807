"""Rates of links between ranks: start-up time and bandwidth, fitted to measurements."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass(slots=True, frozen=True)
class Line:
    """Seconds of a collective: latency_s + num_bytes * s_per_byte."""

    latency_s: float
    s_per_byte: float

    def seconds(self, num_bytes: float) -> float:
        """Time of a collective in which the busiest rank moves `num_bytes`."""
        return self.latency_s + num_bytes * self.s_per_byte if num_bytes else 0.0


def fit_line(num_bytes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line through a short and a long measurement, neither part negative.

    Example: 0 bytes in 1 ms and 1 MB in 3 ms -> latency 1 ms, 2 ns per byte.
    """
    (x0, y0), (x1, y1) = (num_bytes[0], seconds[0]), (num_bytes[-1], seconds[-1])
    slope = max(0.0, (y1 - y0) / (x1 - x0))
    return Line(max(0.0, y0 - slope * x0), slope)


@dataclass(slots=True, frozen=True)
class ExchangeRates:
    """Measured on the context-parallel ranks. inner, outer: all-to-all within and between nodes."""

    all_to_all: Line
    all_gather: Line
    reduce_scatter: Line
    inner: Line
    outer: Line

    def flat(self) -> list[float]:
        """As numbers, for the wire."""
        return [x for line in astuple(self) for x in line]

    @classmethod
    def from_flat(cls, values: Sequence[float]) -> "ExchangeRates":
        """Inverse of `flat`."""
        return cls(*(Line(a, b) for a, b in zip(values[::2], values[1::2], strict=True)))

"""What an exchange costs, from measured rates: which scheme `kv_exchange=auto` takes.

A collective takes latency + bytes / rate; bytes are those of the rank that sends or receives most, since all
wait for it. Costs are of the wire alone: both schemes compute the same, and hide about as much under it.

Shapes: P ranks, NP pairs of a rank.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from msa_train.config import KvExchange
from msa_train.parallel.kv_exchange.plan import ExchangeShape


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


@dataclass(slots=True, frozen=True)
class PairBytes:
    """Bytes of one pair: keys and values going out, gradients coming back (0: no backward pass)."""

    forward: int
    backward: int


def selected_cost(
    shape: ExchangeShape,
    busiest: Sequence[int],
    num_hot: int,
    size: PairBytes,
    rates: ExchangeRates,
    *,
    fetches: int = 1,
) -> float:
    """Seconds of sending selected pairs, forward and backward.

    Args:
        shape: of the exchange.
        busiest: by hop, pairs that the rank sends or receives that does so most.
        num_hot: hot pairs of all owners.
        size: of a pair.
        rates: measured.
        fetches: 2 where pairs are fetched again in the backward pass.
    """
    hops = [rates.outer, rates.inner] if shape.hierarchical else [rates.all_to_all]
    total = 0.0
    for line, pairs in zip(hops, busiest, strict=True):
        total += fetches * line.seconds(pairs * size.forward) + line.seconds(pairs * size.backward)
    share = num_hot / shape.cp_size
    total += fetches * rates.all_to_all.seconds(share * size.forward)
    total += fetches * rates.all_gather.seconds(num_hot * size.forward)
    total += rates.all_to_all.seconds(num_hot * size.backward) + rates.all_to_all.seconds(
        share * size.backward
    )
    return total


def all_gather_cost(shape: ExchangeShape, size: PairBytes, rates: ExchangeRates) -> float:
    """Seconds of gathering all pairs, in the backward pass once more, and reducing their gradients."""
    pairs = (shape.cp_size - 1) * shape.num_pairs
    fetches = 2 if size.backward else 1
    return fetches * rates.all_gather.seconds(pairs * size.forward) + rates.reduce_scatter.seconds(
        pairs * size.backward
    )


def choose_full_exchange(
    busiest_tokens: int, others_tokens: int, token_bytes: int, rates: ExchangeRates | None
) -> KvExchange:
    """What `auto` means for full attention over a pack: its documents decide, so all ranks find the same.

    Args:
        busiest_tokens: most tokens that a rank sends or receives if each fetches what its queries see.
        others_tokens: tokens that all other ranks hold together.
        token_bytes: keys and values of a token.
        rates: measured; None on a single rank.
    """
    if rates is None:
        return KvExchange.selected
    selected = 2 * rates.all_to_all.seconds(busiest_tokens * token_bytes)
    num_bytes = others_tokens * token_bytes
    gathered = 2 * rates.all_gather.seconds(num_bytes) + rates.reduce_scatter.seconds(num_bytes)
    return KvExchange.selected if selected <= gathered else KvExchange.all_gather

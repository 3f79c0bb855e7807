"""Cut a list of layers into contiguous stages so that the slowest rank is as fast as can be.

With one chunk per rank the cut is exact: the smallest possible price of the slowest stage, then the evenest
cut among those. With several chunks per rank (an interleaved pipeline: chunk i of the list is on rank i %
pp_size) layers are moved between chunks as long as that helps, from several beginnings.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

_BISECTIONS = 60
"halvings of the interval that holds the best price: to the last bit of a float"
_SHIFTS = (1, 2, 4, 8)
"layers that are moved at once"
_LOCKSTEP_WEIGHT = 0.1
"of the time in which ranks go through their chunks side by side, beside the sum of the slowest rank"


def even_layout(num_layers: int, pp_size: int, chunks: int = 1) -> tuple[int, ...]:
    """Cut into pp_size * chunks parts of equal sizes, the first ones one layer larger where there is a rest.

    Example: 10 layers, pp_size 4 -> 3, 3, 2, 2.
    """
    parts = pp_size * chunks
    return tuple(num_layers // parts + (part < num_layers % parts) for part in range(parts))


def rank_sums(values: Sequence[float], sizes: Sequence[int], pp_size: int) -> list[float]:
    """Sum a value of each layer over the layers of each rank: [pp_size].

    Example: values 1, 2, 3, 4, sizes 1, 1, 1, 1, pp_size 2 -> 4, 6: chunks 0 and 2 are on rank 0.
    """
    sums, begin = [0.0] * pp_size, 0
    for part, size in enumerate(sizes):
        sums[part % pp_size] += sum(values[begin : begin + size])
        begin += size
    return sums


def best_layout(
    prices: Sequence[float],
    pp_size: int,
    chunks: int = 1,
    *,
    layer_bytes: Sequence[float] | None = None,
    max_bytes: float = math.inf,
) -> tuple[int, ...] | None:
    """Find layers per stage that minimise the price of the slowest rank.

    2 ms for 60 layers in 4 stages; 0.1 s to 2 s with 2 chunks in 4 to 8 stages.

    Args:
        prices: of each layer, with the embedding's in the first and the output layer's in the last.
        pp_size: pipeline ranks.
        chunks: of each rank; 1: not interleaved.
        layer_bytes: of each layer; None: memory is not looked at.
        max_bytes: that the layers of a rank may take together.

    Returns:
        [pp_size * chunks] layers of each chunk, at least one each; None where no cut was found that fits.
        With several chunks a cut that fits may exist though none was found.

    Example: prices 4, 1, 1, 1, 1 in two stages -> 1, 4.
    """
    if len(prices) < pp_size * chunks:
        return None
    sizes = [0.0] * len(prices) if layer_bytes is None else list(layer_bytes)
    if chunks == 1:
        return _contiguous(list(prices), sizes, pp_size, max_bytes)
    search = _Search(list(prices), sizes, pp_size, max_bytes)
    found = [search.improve(list(start)) for start in search.starts(chunks)]
    best = min(found, key=search.cost)
    return tuple(best) if search.excess(best) <= 0 else None


def _contiguous(
    prices: list[float], num_bytes: list[float], pp_size: int, max_bytes: float
) -> tuple[int, ...] | None:
    """Cut into pp_size stages: the smallest maximum by bisection, then the evenest by dynamic programming."""
    if max(num_bytes) > max_bytes or _stages_needed(prices, num_bytes, math.inf, max_bytes) > pp_size:
        return None
    low, high = max(prices), sum(prices)
    if _stages_needed(prices, num_bytes, low, max_bytes) <= pp_size:
        high = low
    for _ in range(_BISECTIONS if high > low else 0):
        middle = (low + high) / 2
        if _stages_needed(prices, num_bytes, middle, max_bytes) <= pp_size:
            high = middle
        else:
            low = middle
    # sums in another order differ in the last digits
    return _evenest(prices, num_bytes, pp_size, high * (1 + 1e-9), max_bytes)


def _stages_needed(prices: list[float], num_bytes: list[float], most: float, max_bytes: float) -> int:
    """Count the stages where each is filled up to both limits."""
    stages, price, size = 1, 0.0, 0.0
    for one, its_bytes in zip(prices, num_bytes, strict=True):
        price, size = price + one, size + its_bytes
        if price > most or size > max_bytes:
            stages, price, size = stages + 1, one, its_bytes
    return stages


def _evenest(
    prices: list[float], num_bytes: list[float], pp_size: int, most: float, max_bytes: float
) -> tuple[int, ...]:
    """Cut within both limits so that the sum of squared prices is smallest. O(layers^2) at most."""
    num_layers = len(prices)
    price_to, bytes_to = ([0.0, *accumulate(values)] for values in (prices, num_bytes))
    # best[end]: smallest sum of squares of layers before `end` in the stages so far, and where the last began
    best: list[float] = [0.0] + [math.inf] * num_layers
    begins: list[list[int]] = []
    for _ in range(pp_size):
        new, begin_of = [math.inf] * (num_layers + 1), [0] * (num_layers + 1)
        for end in range(1, num_layers + 1):
            for begin in range(end - 1, -1, -1):
                price = price_to[end] - price_to[begin]
                if price > most or bytes_to[end] - bytes_to[begin] > max_bytes:
                    break
                if best[begin] + price**2 < new[end]:
                    new[end], begin_of[end] = best[begin] + price**2, begin
        best = new
        begins.append(begin_of)
    sizes, end = [0] * pp_size, num_layers
    for stage in range(pp_size - 1, -1, -1):
        begin = begins[stage][end]
        sizes[stage], end = end - begin, begin
    return tuple(sizes)


class _Search:
    """Move layers between chunks while the cost falls."""

    def __init__(self, prices: list[float], num_bytes: list[float], pp_size: int, max_bytes: float) -> None:
        self.prices, self.pp_size, self.max_bytes = prices, pp_size, max_bytes
        self.price_to, self.bytes_to = ([0.0, *accumulate(values)] for values in (prices, num_bytes))

    def starts(self, chunks: int) -> Iterator[Sequence[int]]:
        """Yield cuts to begin with: equal numbers, equal prices, and single layers at the front."""
        num_layers, parts = len(self.prices), self.pp_size * chunks
        yield even_layout(num_layers, self.pp_size, chunks)
        by_price = _contiguous(self.prices, [0.0] * num_layers, parts, math.inf)
        if by_price is not None:
            yield by_price
        # dear layers that come first are dealt out one to a rank
        rest = even_layout(num_layers - self.pp_size, self.pp_size, chunks - 1)
        yield (*[1] * self.pp_size, *rest)

    def excess(self, sizes: Sequence[int]) -> float:
        """Return the bytes above the limit, summed over ranks."""
        used = self._by_rank(self.bytes_to, sizes)
        return sum(max(0.0, one - self.max_bytes) for one in used)

    def cost(self, sizes: Sequence[int]) -> tuple[float, float, float]:
        """Return what is to be small: excess bytes; slowest rank and lockstep; squares of the ranks' sums.

        In an interleaved pipeline ranks pass through their first chunks side by side, then through the second
        ones: a chunk that is dearer than its neighbours holds them up, even where the sums are equal.
        """
        sums = self._by_rank(self.price_to, sizes)
        parts = self._parts(self.price_to, sizes)
        waves = [max(parts[at : at + self.pp_size]) for at in range(0, len(parts), self.pp_size)]
        slowest = max(sums) + _LOCKSTEP_WEIGHT * sum(waves)
        return self.excess(sizes), slowest, sum(one**2 for one in sums)

    def improve(self, sizes: list[int]) -> list[int]:
        """Take the best move again and again until none helps."""
        cost = self.cost(sizes)
        while True:
            options = [(self.cost(other), other) for other in _moved(sizes)]
            best = min(options, default=(cost, sizes))
            # in steps worth taking, so that rounding cannot keep it going
            if not best[0] < cost or all(
                math.isclose(new, old, rel_tol=1e-12) for new, old in zip(best[0], cost, strict=True)
            ):
                return sizes
            cost, sizes = best

    def _parts(self, sum_to: list[float], sizes: Sequence[int]) -> list[float]:
        ends = list(accumulate(sizes))
        return [sum_to[end] - sum_to[end - size] for end, size in zip(ends, sizes, strict=True)]

    def _by_rank(self, sum_to: list[float], sizes: Sequence[int]) -> list[float]:
        parts = self._parts(sum_to, sizes)
        return [sum(parts[rank :: self.pp_size]) for rank in range(self.pp_size)]


def _moved(sizes: list[int]) -> Iterator[list[int]]:
    """Yield every cut in which one chunk gives layers to another; those between shift along."""
    for giver, given in enumerate(sizes):
        for taker in range(len(sizes)):
            for shift in _SHIFTS:
                if taker == giver or given <= shift:
                    continue
                changed = list(sizes)
                changed[giver] -= shift
                changed[taker] += shift
                yield changed

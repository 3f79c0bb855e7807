"""What an exchange costs, from measured rates: which scheme `kv_exchange=auto` takes.

A collective takes latency + bytes / rate; bytes are those of the rank that sends or receives most, since all
wait for it. Costs are of the wire alone: both schemes compute the same, and hide about as much under it.

Shapes: P ranks, NP pairs of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from msa_train.config import KvExchange
from msa_train.parallel.comm.link_rates import ExchangeRates
from msa_train.parallel.kv_exchange.plan import ExchangeShape


@dataclass(slots=True, frozen=True)
class KvBlockBytes:
    """Bytes of one pair: keys and values going out, gradients coming back (0: no backward pass)."""

    forward: int
    backward: int


def selected_cost(
    shape: ExchangeShape,
    busiest: Sequence[int],
    num_hot: int,
    size: KvBlockBytes,
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


def all_gather_cost(shape: ExchangeShape, size: KvBlockBytes, rates: ExchangeRates) -> float:
    """Seconds of gathering all pairs, in the backward pass once more, and reducing their gradients."""
    pairs = (shape.cp_size - 1) * shape.num_kv_blocks
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

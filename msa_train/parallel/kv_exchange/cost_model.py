"""Estimate what an exchange costs, from measured rates: the scheme that `kv_exchange=auto` takes.

A collective takes latency + bytes / rate; bytes are those of the rank that sends or receives most, since all
wait for it. Costs are of the wire alone: both schemes compute the same, and hide about as much under it.

Shapes: P ranks, NP KV blocks of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from msa_train.config import KvExchange
from msa_train.parallel.comm.link_rates import ExchangeRates
from msa_train.parallel.kv_exchange.plan import ExchangeShape


@dataclass(slots=True, frozen=True)
class KvBlockBytes:
    """Hold the bytes of one KV block: 64 KiB each way at B = D = 128 in bf16, index keys 32 KiB more.

    Gradients of an all-gather are twice as many bytes in bf16: 192 KiB.
    """

    forward: int
    "keys and values, going out"
    backward: int
    "gradients of them and of index keys, coming back; 0: no backward pass"
    added: int
    "the same gradients where a reduce-scatter adds them on the way, in fp32 at least"


# Share of the own gradients that is computed before others' leave the node. So its ranks need not end those
# at the same time; what is left hides the network.
OWN_BEFORE = 0.25
# Packing, adding up and waiting for slower ranks are not in the costs, and an all-gather has none of them: a
# choice made before the scoring takes selected KV blocks where they cost at most this share of it.
SELECTED_PAYS = 0.85


def selected_cost(
    shape: ExchangeShape,
    busiest: Sequence[int],
    num_hot: int,
    size: KvBlockBytes,
    rates: ExchangeRates,
    *,
    fetches: int = 1,
) -> float:
    """Estimate the seconds of sending selected KV blocks, forward and backward.

    Args:
        shape: of the exchange.
        busiest: by hop, KV blocks that the rank sends or receives that does so most.
        num_hot: broadcast blocks of all owners.
        size: of a KV block.
        rates: measured.
        fetches: 2 where KV blocks are fetched again in the backward pass.

    Example: 1 ms of latency and 1 GB/s everywhere, 1,000 KV blocks of 64 KiB for the busiest rank, as much
    back, no broadcast -> 2 * (.001 + .0655) = .133 s.
    """
    hops = [rates.outer, rates.inner] if shape.hierarchical else [rates.all_to_all]
    total = 0.0
    # Hops follow one another, so their times add up.
    for line, pairs in zip(hops, busiest, strict=True):
        total += fetches * line.seconds(pairs * size.forward) + line.seconds(pairs * size.backward)
    # A broadcast goes in two steps: to its P slices, then to everyone; back the same way.
    share = num_hot / shape.cp_size
    total += fetches * rates.all_to_all.seconds(share * size.forward)
    total += fetches * rates.all_gather.seconds(num_hot * size.forward)
    total += rates.all_to_all.seconds(num_hot * size.backward) + rates.all_to_all.seconds(
        share * size.backward
    )
    return total


def all_gather_cost(shape: ExchangeShape, size: KvBlockBytes, rates: ExchangeRates) -> float:
    """Estimate the seconds of gathering all KV blocks, in the backward pass again, and reducing gradients."""
    # Every rank receives the KV blocks of all others, and as many gradients of its own.
    pairs = (shape.cp_size - 1) * shape.num_kv_blocks
    fetches = 2 if size.backward else 1
    return fetches * rates.all_gather.seconds(pairs * size.forward) + rates.reduce_scatter.seconds(
        pairs * size.added
    )


def choose_full_exchange(
    busiest_tokens: int,
    others_tokens: int,
    token_bytes: int,
    rates: ExchangeRates | None,
    *,
    grad_bytes: int | None = None,
) -> KvExchange:
    """Decide what `auto` means for full attention over a pack: its documents decide, so all ranks agree.

    Args:
        busiest_tokens: most tokens that a rank sends or receives if each fetches what its queries see.
        others_tokens: tokens that all other ranks hold together.
        token_bytes: keys and values of a token.
        rates: measured; None on a single rank.
        grad_bytes: gradients of a token as a reduce-scatter adds them, in fp32; None: as token_bytes.

    Returns:
        `selected` or `all_gather`.
    """
    if rates is None:
        return KvExchange.selected
    # Selected tokens are kept for the backward pass, gathered ones come twice; gradients come back once.
    selected = 2 * rates.all_to_all.seconds(busiest_tokens * token_bytes)
    num_bytes = others_tokens * token_bytes
    added = num_bytes if grad_bytes is None else others_tokens * grad_bytes
    gathered = 2 * rates.all_gather.seconds(num_bytes) + rates.reduce_scatter.seconds(added)
    return KvExchange.selected if selected <= gathered else KvExchange.all_gather

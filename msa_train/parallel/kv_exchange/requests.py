"""Agree with all ranks which KV blocks each needs from whom: from the selection to a plan.

A request is 64 + P * W bytes: 4 KiB at 256 ranks and 1M tokens (block 128, M = 4), and every rank receives
those of all others, 1 MiB per layer. The host gets some 3,300 numbers in one copy (nodes of 8: 2,900), of
which it compares 256 headers of 6 with each other.

Shapes: T local queries, M KV heads, NB blocks of the pack, NL = NB / P blocks per rank, P ranks, NP = M * NL
KV blocks of a rank, numbered head * NL + local block, W = ceil(NP / 8) bytes of a bitmap of them.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from msa_train.config import ExchangeConfig, KvExchange
from msa_train.parallel.comm.cp_comm import Pending
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.comm.rank_faults import ExchangeError, describe
from msa_train.parallel.comm.to_device import to_device
from msa_train.parallel.kv_exchange.cost_model import KvBlockBytes, all_gather_cost, selected_cost
from msa_train.parallel.kv_exchange.plan import (
    Demand,
    ExchangeShape,
    RankPlan,
    count_rows,
    find_demand,
    find_loads,
    pack_bits,
    plan_rank,
)
from msa_train.parallel.kv_exchange.rows.node_hops import Earlier
from msa_train.parallel.sharding.shard_layout import ShardLayout

# First number of every request; the last digits are a version.
_MAGIC = 0x4D5341_0001
# Numbers (int64) of a header.
_HEADER = 8
# Bits of the header's last number.
_BAD_INDEX_KEYS, _BAD_KEY_VALUES = 1, 2


def needed_kv_blocks(block_indices: Tensor, num_blocks: int) -> Tensor:
    """Mark the KV blocks that some query selects: [T, M, topk] block ids, -1 for none -> [M, NB] bool.

    Example: two queries of one head, [[[2, 0]], [[2, -1]]], 4 blocks -> [[True, False, True, False]].
    """
    num_kv_heads = block_indices.shape[1]
    # Column 0 takes the -1 entries and is cut off: no mask, whose size the host would have to wait for.
    needed = torch.zeros(num_kv_heads, num_blocks + 1, dtype=torch.bool, device=block_indices.device)
    ids = block_indices.permute(1, 0, 2).reshape(num_kv_heads, -1).long() + 1
    return needed.scatter_(1, ids, True)[:, 1:]


def kv_blocks_by_owner(needed: Tensor, layout: ShardLayout) -> Tensor:
    """Sort marks by owner: [M, NB] of all blocks -> [P, NP], this rank's own left out (False).

    Example: rank 0 has blocks 0 and 3, rank 1 blocks 1 and 2; [[1, 1, 0, 1], [0, 0, 1, 0]] of two heads ->
    [[0, 0, 0, 0], [1, 0, 0, 1]] on rank 0 and [[1, 1, 0, 0], [0, 0, 0, 0]] on rank 1.
    """
    wanted = layout.blocks_by_owner(needed).flatten(1).clone()
    wanted[layout.cp_rank] = False
    return wanted


def global_block(owner: Tensor, local_block: Tensor, layout: ShardLayout) -> Tensor:
    """Find the block of the pack from its owner and its number there; int64 of the inputs' common shape.

    Example: rank 0 has blocks 0 and 3, rank 1 blocks 1 and 2; owners [0, 1, 1] and local blocks [1, 0, 1] ->
    [3, 1, 2].
    """
    return layout.blocks(owner.device)[owner, local_block]


@dataclass(slots=True)
class ExchangeDecision:
    """Hold the agreed exchange of one layer call, kept for the backward pass and for recomputation."""

    kind: KvExchange
    "way of the exchange; never `auto`"
    plan: RankPlan | None = None
    "this rank's part of an exchange of selected KV blocks; None for the other ways"
    spoilt: bool = False
    "some rank has index keys, keys or values that are not finite; the output is NaN on all ranks"


@dataclass(slots=True)
class ExchangeTerms:
    """Hold what a request says beside the needs, and what decides about it."""

    kind: KvExchange
    "`selected`, or `auto` to choose between it and all-gather"
    settings: ExchangeConfig
    "of the exchange"
    size: KvBlockBytes
    "bytes of a KV block, for the choice"
    checked: tuple[Tensor | None, Tensor]
    "this rank's index keys [T, Di] (or None), and its keys and values [M * NL, 2, B, D]"


def exchange_requests(
    needed: Tensor, layout: ShardLayout, comm: KvComm, terms: ExchangeTerms
) -> ExchangeDecision:
    """Tell all ranks which KV blocks this one needs, and learn what the others need.

    One all-gather of bitmaps with a header, one host copy of a few numbers per rank.

    The header says whether a rank has values that are not finite. Selections made by NaN are arbitrary, but
    every rank must still run the same collectives to the end of the step; so nothing is raised here, all
    ranks learn of it alike, and `ExchangeDecision.spoilt` makes the output NaN on all of them.

    Args:
        needed: [M, NB] bool, this rank's needs; own blocks are ignored.
        layout: this rank's shard.
        comm: collectives of the ranks between which KV blocks travel, of this layer.
        terms: see ExchangeTerms.

    Returns:
        The decision; the same kind and verdict on all ranks, each with its own plan.

    Raises:
        ExchangeError: a rank's request does not fit, or the all-gather failed.
    """
    shape = request_shape(needed.shape[0], layout, comm, terms.settings)
    wanted = kv_blocks_by_owner(needed, layout)
    received = start_request(wanted, shape, comm, terms.checked).wait()
    # Only `auto` decides by loads.
    automatic = terms.kind is KvExchange.auto
    agreed = agree(received, shape, layout.cp_rank, comm, more=busiest_rows if automatic else None)
    if automatic and not _selected_pays(shape, agreed.more, agreed.counts, comm, terms):
        return ExchangeDecision(KvExchange.all_gather, spoilt=agreed.spoilt)
    plan = plan_rank(agreed.demand, layout.cp_rank, agreed.counts)
    return ExchangeDecision(KvExchange.selected, plan, spoilt=agreed.spoilt)


def request_shape(
    num_kv_heads: int, layout: ShardLayout, comm: KvComm, settings: ExchangeConfig, *, by_node: bool = True
) -> ExchangeShape:
    """Describe an exchange of these ranks; by_node: over nodes, where the ranks know of them."""
    return ExchangeShape(
        cp_size=layout.cp_size,
        num_kv_heads=num_kv_heads,
        num_local_blocks=layout.num_local_blocks,
        ranks_per_node=0 if comm.inner is None or not by_node else comm.inner.size,
        hot_share=settings.hot_share,
    )


def start_request(
    wanted: Tensor, shape: ExchangeShape, comm: KvComm, checked: tuple[Tensor | None, Tensor | None]
) -> Pending[Tensor]:
    """Begin to tell all ranks which KV blocks this one wants: [P, NP] bool by owner.

    Args:
        wanted: marks, own KV blocks left out.
        shape: of the exchange.
        comm: collectives of the ranks between which KV blocks travel, of this layer.
        checked: see ExchangeTerms; None for what an earlier request of the call has checked.

    Returns:
        What `agree` reads.
    """
    # An exchange of other shapes is rare: this costs one more all-gather of 64 bytes per rank, once.
    if shape not in comm.compared:
        # Bitmaps of unequal length would end a process inside the collective; headers are of one length.
        _introduce(shape, wanted.device, comm)
    header = _header(wanted, shape, comm.layer, checked)
    message = torch.cat((header.view(torch.uint8), pack_bits(wanted).flatten()))
    return comm.start_all_gather(message, "request")


@dataclass(slots=True)
class Agreement:
    """Hold what all ranks know after a request; the same on all of them but for `counts`."""

    demand: Demand
    "of all ranks"
    counts: list[int]
    "of `count_rows`, this rank's"
    more: list[int]
    "what the caller asked for"
    spoilt: bool
    "some rank has values that are not finite"


def agree(
    received: Tensor,
    shape: ExchangeShape,
    rank: int,
    comm: KvComm,
    *,
    more: Callable[[Demand], Tensor] | None = None,
    earlier: Earlier | None = None,
) -> Agreement:
    """Read the requests of all ranks; the host waits here for the sizes of messages, and nowhere else.

    Args:
        received: of `start_request`.
        shape: of the exchange.
        rank: this one.
        comm: of the request.
        more: returns further numbers [n] int64 that the host needs, from the demand.
        earlier: what earlier slices of queries brought, see `count_rows`.

    Raises:
        ExchangeError: a rank's request does not fit.
    """
    headers = received[:, : 8 * _HEADER].flatten().view(torch.int64)
    demand = find_demand(received[:, 8 * _HEADER :].view(shape.cp_size, shape.cp_size, -1), shape)
    rows = count_rows(demand, rank, earlier)
    # An empty tensor where nothing is asked.
    further = rows[:0] if more is None else more(demand)
    parts = [headers, demand.wanted, _asks_itself(received, shape), rows, further]
    # The one host copy of an exchange: sizes of messages must be known to launch them.
    numbers = comm.to_host(torch.cat(parts), "request")
    flat, marked, own, counts, asked = _split(numbers, [part.numel() for part in parts])
    by_rank = [flat[i : i + _HEADER] for i in range(0, len(flat), _HEADER)]
    check_requests(by_rank, marked, own, comm.layer)
    bad_values = find_bad_values(by_rank, comm.layer)
    # For the step's report; the step itself goes on.
    comm.counters.bad_values += bad_values
    return Agreement(demand, counts, asked, bool(bad_values))


def _introduce(shape: ExchangeShape, device: torch.device, comm: KvComm) -> None:
    """Compare shapes with the other ranks, once for each shape."""
    header = to_device(torch.tensor(_known(shape, comm.layer), dtype=torch.int64), device)
    # A purpose of its own: a resumed run meets again, and must log the bytes of requests that the first did.
    headers = comm.all_gather(header, "request_shape").tolist()
    check_requests(headers, [0] * comm.size, [0] * comm.size, comm.layer)
    comm.compared.add(shape)


def _known(shape: ExchangeShape, layer: int) -> list[int]:
    """List the header: magic number, layer, ranks, KV heads, local blocks, node size, 0, 0.

    In place of the zeros come KV blocks wanted, and flags of values that are not finite.
    """
    return [_MAGIC, layer, shape.cp_size, shape.num_kv_heads, shape.num_local_blocks, shape.node_size, 0, 0]


def _split(numbers: list[int], sizes: list[int]) -> list[list[int]]:
    """Cut a list into parts: [1, 2, 3], [2, 0, 1] -> [[1, 2], [], [3]]."""
    ends = list(accumulate(sizes))
    return [numbers[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _header(
    wanted: Tensor, shape: ExchangeShape, layer: int, checked: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """Make the header [8] int64: `_known` with the last two filled in, on the device of `wanted`."""
    header = to_device(torch.tensor(_known(shape, layer), dtype=torch.int64), wanted.device)
    header[6] = wanted.sum()
    for tensor, bit in zip(checked, (_BAD_INDEX_KEYS, _BAD_KEY_VALUES), strict=True):
        if tensor is not None:
            # The norm is one pass without a temporary, and NaN or infinite if any value is.
            bad = torch.linalg.vector_norm(tensor.detach(), float("inf")).isfinite().logical_not()
            header[7] += bad * bit
    return header


def _asks_itself(received: Tensor, shape: ExchangeShape) -> Tensor:
    """Add up the bytes that mark each rank's own KV blocks: [P] int64, 0 where none is marked."""
    bits = received[:, 8 * _HEADER :].view(shape.cp_size, shape.cp_size, -1)
    return bits.diagonal(dim1=0, dim2=1).sum(0, dtype=torch.int64)


def check_requests(headers: list[list[int]], marked: list[int], own: list[int], layer: int) -> None:
    """Refuse requests that do not fit; all ranks see all of them and refuse alike.

    Args:
        headers: by rank, see `_known`.
        marked: by rank, KV blocks marked in the bitmap.
        own: by rank, not 0 where own KV blocks are marked.
        layer: this rank's.

    Raises:
        ExchangeError: naming layer, rank and what is wrong.
    """
    # The first rank that most agree with: two that differ cannot tell who is wrong.
    usual = Counter(tuple(header[:6]) for header in headers).most_common(1)[0][0]
    for rank, (header, pairs, own_marks) in enumerate(zip(headers, marked, own, strict=True)):
        where = f"{describe(layer, 'request')}: cp rank {rank}"
        if header[0] != _MAGIC:
            raise ExchangeError(f"{where} sent something that is no request of this version")
        names = ("magic number", "layer", "cp_size", "KV groups", "blocks per rank", "ranks per node")
        for name, value, expected in zip(names, header[:6], usual, strict=True):
            if value != expected:
                raise ExchangeError(f"{where} asks with {name} {value}, the others with {expected}")
        if pairs != header[6] or own_marks:
            raise ExchangeError(
                f"{where} announces {header[6]} pairs and marks {pairs}"
                + (", some of them its own" if own_marks else "")
            )


def find_bad_values(headers: list[list[int]], layer: int) -> list[str]:
    """Describe what is not finite, a line for each rank that has such values.

    The step goes on, for all ranks must come to its end to judge it.
    """
    names = (("index keys", _BAD_INDEX_KEYS), ("keys or values", _BAD_KEY_VALUES))
    found = []
    for rank, header in enumerate(headers):
        bad = [name for name, bit in names if header[7] & bit]
        if bad:
            where = f"{describe(layer, 'request')}: cp rank {rank}"
            found.append(f"{where} has NaN or infinity in its {' and '.join(bad)}")
    return found


def busiest_rows(demand: Demand) -> Tensor:
    """Find the most KV blocks that a rank sends or receives, by hop: [hops] int64."""
    loads = find_loads(demand)
    pairs = zip(loads.send, loads.receive, strict=True)
    return torch.stack([torch.maximum(send, receive).max() for send, receive in pairs])


def _selected_pays(
    shape: ExchangeShape, busiest: list[int], counts: list[int], comm: KvComm, terms: ExchangeTerms
) -> bool:
    """Tell whether sending selected KV blocks is faster than gathering all.

    All ranks decide from the same numbers: loads of all ranks, and rates that they share.
    """
    assert comm.rates is not None, "auto measures rates when the groups are built"
    # Fetching again in the backward pass doubles what goes out; gradients come back once.
    fetches = 1 if terms.settings.keep_for_backward or not terms.size.backward else 2
    num_hot = sum(counts[-shape.cp_size :])
    selected = selected_cost(shape, busiest, num_hot, terms.size, comm.rates, fetches=fetches)
    return selected <= all_gather_cost(shape, terms.size, comm.rates)

"""Which (block, group) pairs a rank needs from whom: from the selection to an agreed plan.

Shapes: T local queries, M KV groups, NB blocks of the pack, NL = NB / P blocks per rank, P ranks, NP = M * NL
pairs of a rank, numbered group * NL + local block, W bytes of a bitmap of pairs.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from msa_train.config import ExchangeConfig, KvExchange
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
from msa_train.parallel.sharding.shard_layout import ShardLayout

# First number of every request; the last digits are a version.
_MAGIC = 0x4D5341_0001
_HEADER = 8
# Bits of the header's last number.
_BAD_INDEX_KEYS, _BAD_KEY_VALUES = 1, 2


def needed_kv_blocks(block_indices: Tensor, num_blocks: int) -> Tensor:
    """[T, M, topk] block ids, -1 for none -> [M, NB] bool: does any query of the group select the block?"""
    num_groups = block_indices.shape[1]
    # Column 0 takes the -1 entries and is cut off.
    needed = torch.zeros(num_groups, num_blocks + 1, dtype=torch.bool, device=block_indices.device)
    ids = block_indices.permute(1, 0, 2).reshape(num_groups, -1).long() + 1
    return needed.scatter_(1, ids, True)[:, 1:]


def kv_blocks_by_owner(needed: Tensor, layout: ShardLayout) -> Tensor:
    """[M, NB] of all blocks -> [P, NP] by owner, this rank's own left out (False)."""
    wanted = layout.blocks_by_owner(needed).flatten(1).clone()
    wanted[layout.cp_rank] = False
    return wanted


def global_block(owner: Tensor, local_block: Tensor, layout: ShardLayout) -> Tensor:
    """Block of the pack from its owner and its number there."""
    return layout.blocks(owner.device)[owner, local_block]


@dataclass(slots=True)
class ExchangeDecision:
    """The agreed exchange of one layer call, kept for the backward pass and for recomputation.

    kind: selected, or all_gather where `auto` chose that (then there is no plan). spoilt: whether a rank has
    index keys, keys or values that are not finite. A selection made by such keys is none, and may not take
    them: the output of the call is NaN on all ranks, so that the step is judged bad.
    """

    kind: KvExchange
    plan: RankPlan | None = None
    spoilt: bool = False


@dataclass(slots=True)
class ExchangeTerms:
    """What a request says beside the needs, and what decides about it.

    size: bytes of a pair, for the choice. checked: this rank's index keys (or None), keys and values.
    """

    kind: KvExchange
    settings: ExchangeConfig
    size: KvBlockBytes
    checked: tuple[Tensor | None, Tensor]


def exchange_requests(
    needed: Tensor, layout: ShardLayout, comm: KvComm, terms: ExchangeTerms
) -> ExchangeDecision:
    """Tell all ranks which pairs this one needs, and learn what the others need.

    One all-gather of bitmaps with a header, one host copy of a few numbers per rank.

    Args:
        needed: [M, NB] bool, this rank's needs; own blocks are ignored.
        layout: this rank's shard.
        comm: collectives of the context-parallel group, of this layer.
        terms: see ExchangeTerms.

    Raises:
        ExchangeError: a rank's request does not fit.
    """
    shape = ExchangeShape(
        cp_size=layout.cp_size,
        num_groups=needed.shape[0],
        num_local_blocks=layout.num_local_blocks,
        ranks_per_node=0 if comm.inner is None else comm.inner.size,
        hot_share=terms.settings.hot_share,
    )
    if shape not in comm.compared:
        # Bitmaps of unequal length would end a process inside the collective; headers are of one length.
        _introduce(shape, needed.device, comm)
    wanted = kv_blocks_by_owner(needed, layout)
    header = _header(wanted, shape, comm.layer, terms.checked)
    message = torch.cat((header.view(torch.uint8), pack_bits(wanted).flatten()))
    received = comm.all_gather(message, "request")
    headers = received[:, : 8 * _HEADER].flatten().view(torch.int64)
    demand = find_demand(received[:, 8 * _HEADER :].view(shape.cp_size, shape.cp_size, -1), shape)
    rows = count_rows(demand, layout.cp_rank)
    busiest = _busiest(demand) if terms.kind is KvExchange.auto else rows[:0]
    parts = [headers, demand.wanted, _asks_itself(received, shape), rows, busiest]
    # The one host copy of an exchange.
    numbers = comm.to_host(torch.cat(parts), "request")
    flat, marked, own, counts, most = _split(numbers, [part.numel() for part in parts])
    by_rank = [flat[i : i + _HEADER] for i in range(0, len(flat), _HEADER)]
    check_requests(by_rank, marked, own, comm.layer)
    bad_values = find_bad_values(by_rank, comm.layer)
    comm.counters.bad_values += bad_values
    if terms.kind is KvExchange.auto and not _selected_pays(shape, most, counts, comm, terms):
        return ExchangeDecision(KvExchange.all_gather, spoilt=bool(bad_values))
    return ExchangeDecision(
        KvExchange.selected, plan_rank(demand, layout.cp_rank, counts), spoilt=bool(bad_values)
    )


def _introduce(shape: ExchangeShape, device: torch.device, comm: KvComm) -> None:
    """Compare shapes with the other ranks, once for each shape."""
    header = to_device(torch.tensor(_known(shape, comm.layer), dtype=torch.int64), device)
    # A purpose of its own: a resumed run meets again, and must log the bytes of requests that the first did.
    headers = comm.all_gather(header, "request_shape").tolist()
    check_requests(headers, [0] * comm.size, [0] * comm.size, comm.layer)
    comm.compared.add(shape)


def _known(shape: ExchangeShape, layer: int) -> list[int]:
    """[8] magic number, layer, ranks, groups, local blocks, node size, pairs wanted, bad values."""
    return [_MAGIC, layer, shape.cp_size, shape.num_groups, shape.num_local_blocks, shape.node_size, 0, 0]


def _split(numbers: list[int], sizes: list[int]) -> list[list[int]]:
    ends = list(accumulate(sizes))
    return [numbers[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _header(
    wanted: Tensor, shape: ExchangeShape, layer: int, checked: tuple[Tensor | None, Tensor]
) -> Tensor:
    """[8] int64: `_known` with the last two filled in, on the device of `wanted`."""
    header = to_device(torch.tensor(_known(shape, layer), dtype=torch.int64), wanted.device)
    header[6] = wanted.sum()
    for tensor, bit in zip(checked, (_BAD_INDEX_KEYS, _BAD_KEY_VALUES), strict=True):
        if tensor is not None:
            # The norm is one pass without a temporary, and NaN or infinite if any value is.
            bad = torch.linalg.vector_norm(tensor.detach(), float("inf")).isfinite().logical_not()
            header[7] += bad * bit
    return header


def _asks_itself(received: Tensor, shape: ExchangeShape) -> Tensor:
    """[P] int64: marks of each rank for its own pairs."""
    bits = received[:, 8 * _HEADER :].view(shape.cp_size, shape.cp_size, -1)
    return bits.diagonal(dim1=0, dim2=1).sum(0, dtype=torch.int64)


def check_requests(headers: list[list[int]], marked: list[int], own: list[int], layer: int) -> None:
    """Refuse requests that do not fit; all ranks see all of them and refuse alike.

    Args:
        headers: by rank, see `_known`. marked: by rank, pairs marked in the bitmap. own: by rank, not 0
        where
            own pairs are marked. layer: this rank's.

    Raises:
        ExchangeError: naming layer, rank and what is wrong.
    """
    # The first rank that most agree with: two that differ cannot tell who is wrong.
    usual = max((header[:6] for header in headers), key=[header[:6] for header in headers].count)
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
    """What is not finite, by rank; the step goes on, for all ranks must come to its end to judge it."""
    names = (("index keys", _BAD_INDEX_KEYS), ("keys or values", _BAD_KEY_VALUES))
    found = []
    for rank, header in enumerate(headers):
        bad = [name for name, bit in names if header[7] & bit]
        if bad:
            where = f"{describe(layer, 'request')}: cp rank {rank}"
            found.append(f"{where} has NaN or infinity in its {' and '.join(bad)}")
    return found


def _busiest(demand: Demand) -> Tensor:
    """[hops] int64: the most pairs that a rank sends or receives."""
    loads = find_loads(demand)
    pairs = zip(loads.send, loads.receive, strict=True)
    return torch.stack([torch.maximum(send, receive).max() for send, receive in pairs])


def _selected_pays(
    shape: ExchangeShape, busiest: list[int], counts: list[int], comm: KvComm, terms: ExchangeTerms
) -> bool:
    """Whether sending selected pairs is faster than gathering all; all ranks decide from the same numbers."""
    assert comm.rates is not None, "auto measures rates when the groups are built"
    fetches = 1 if terms.settings.keep_for_backward or not terms.size.backward else 2
    num_hot = sum(counts[-shape.cp_size :])
    selected = selected_cost(shape, busiest, num_hot, terms.size, comm.rates, fetches=fetches)
    return selected <= all_gather_cost(shape, terms.size, comm.rates)

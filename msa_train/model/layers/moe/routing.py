"""Say where the tokens of a layer go, tile by tile; the host waits for it once a layer.

The numbers of all tiles, of what leaves and of what arrives, travel in one message and come to the host in
one copy. What is needed again in the backward pass is kept in the record of the layer's call: recomputation
and backward replay it and wait for nothing.

Tokens are counted in granules, an eighth of a tile. A tile takes as many as fit: up to train.tile_tokens, and
up to 1.5 times its share of rows on the busiest rank, so that badly balanced experts make smaller tiles and
not larger buffers. A granule is never cut: only where one rank gets more than 12 times its share, a tile has
more rows than that.

Shapes: T tokens of this rank, k experts a token, E experts, L of them on each of P ranks, g granules.

Cost of a layer at 1M tokens on 64 ranks (T = 16,384, k = 4, E = 128) in 8 tiles of 64 granules, by
arithmetic: each rank gathers 64 x 32 KiB; one copy of 64 KiB to the host; a record of 256 + 32 KiB.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.parallel.comm.fault_watch import watched

_GRANULES_PER_TILE = 8
# rows on the busiest rank relative to an equal share, with which a tile of train.tile_tokens is full
_FULL = 1.5


@dataclass(frozen=True, slots=True)
class Tile:
    """Hold how many rows of a tile travel, as the host knows it."""

    start: int
    "first token"
    stop: int
    "token after the last one"
    granules: tuple[int, int]
    "first granule, and the one after the last"
    send: list[int]
    "[P] rows that leave for each rank"
    receive: list[int]
    "[P] rows that arrive from each rank"
    per_expert: list[int]
    "[L] rows that arrive for each local expert"


@dataclass(frozen=True, slots=True)
class Routing:
    """Hold where the tokens of one call of a layer go."""

    experts: Tensor
    "[T, k] int32, experts of each token; E where there is none, as for padding"
    received: Tensor
    "[g, P, L] int32 rows that arrive, by granule, rank and local expert"
    tiles: list[Tile]
    "in the order of their tokens"


class CountsSize(NamedTuple):
    """Say how many numbers `counts_on_host` is asked for."""

    granules: int
    "g"
    ranks: int
    "P"
    local_experts: int
    "L"
    rows: int
    "T k, which leave unless they are padding"


def counts_on_host(counts: Tensor, _size: CountsSize) -> list[int]:
    """Copy numbers to the host: the one place of an MoE layer where the host waits for the device.

    Whoever runs a step without data, as a tracer does, answers here in the place of the device, with what
    `assumed_counts` says.

    Args:
        counts: [2 g P L + g]: rows that leave, then rows that arrive, both by granule, rank and local expert;
            then for each granule the rows that arrive at the rank where most do.
    """
    return counts.tolist()


def assumed_counts(size: CountsSize, imbalance: float = 1.0) -> list[int]:
    """Answer for `counts_on_host` where there is no data: all rows leave, spread evenly over the experts.

    Args:
        size: what it was asked for.
        imbalance: what arrives here, on the busiest rank, relative to an equal share; not of one rank alone,
            whose rows stay.

    Example: 16 rows, 2 granules, 2 ranks of 1 expert, imbalance 1.5 -> 4 rows to each expert in each granule,
    6 from each rank, 12 in all in each granule.
    """
    shape = size.granules, size.ranks, size.local_experts
    leaves = _spread(size.rows, shape)
    arrives = _spread(round(size.rows * imbalance), shape) if size.ranks > 1 else leaves
    counts: list[int] = np.stack((leaves, arrives)).flatten().tolist()
    return counts + arrives.sum((1, 2)).tolist()


def _spread(total: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Spread rows over granules, ranks and experts, the first of each granule having one more."""
    per_granule = np.full(shape[0], total // shape[0])
    per_granule[: total % shape[0]] += 1
    cells = shape[1] * shape[2]
    more = np.arange(cells) < (per_granule % cells)[:, None]
    return (per_granule[:, None] // cells + more).reshape(shape)


def plan_routing(
    experts: Tensor, num_experts: int, group: dist.ProcessGroup, tile_tokens: int, layer: int
) -> Routing:
    """Agree with the other ranks on the rows of all tiles. All ranks of the group have T tokens.

    Args:
        experts: [T, k], see Routing.
        num_experts: E.
        group: ranks that share the experts.
        tile_tokens: most tokens of a tile; 0: one tile.
        layer: its number, for messages.
    """
    num_tokens, topk = experts.shape
    granule = -(-tile_tokens // _GRANULES_PER_TILE) or max(num_tokens, 1)
    num_granules = max(1, -(-num_tokens // granule))
    sent = _count(experts, num_experts, num_granules, granule)
    sent = sent.view(num_granules, group.size(), -1)
    received, busiest = _trade(sent, group, layer, is_tiled=tile_tokens > 0)
    size = CountsSize(*sent.shape, rows=experts.numel())
    flat = counts_on_host(torch.cat((sent.flatten(), received.flatten(), busiest)), size)
    on_host = np.array(flat[:-num_granules]).reshape(2, *sent.shape)
    most = int(_FULL * tile_tokens * topk) if tile_tokens else 0
    runs = _runs(flat[-num_granules:], max(1, tile_tokens // granule), most)
    tiles = [
        Tile(
            start=first * granule,
            stop=min(last * granule, num_tokens),
            granules=(first, last),
            send=on_host[0, first:last].sum((0, 2)).tolist(),
            receive=on_host[1, first:last].sum((0, 2)).tolist(),
            per_expert=on_host[1, first:last].sum((0, 1)).tolist(),
        )
        for first, last in runs
    ]
    return Routing(experts, received, tiles)


def _trade(sent: Tensor, group: dist.ProcessGroup, layer: int, *, is_tiled: bool) -> tuple[Tensor, Tensor]:
    """Tell all ranks what leaves: sent [g, P, L] -> received [g, P, L], rows of the busiest rank [g]."""
    busiest = sent.sum((1, 2), dtype=sent.dtype)
    if group.size() == 1:
        return sent, busiest
    with watched("expert", layer):
        if not is_tiled:
            received = torch.empty_like(sent)
            dist.all_to_all_single(received[0], sent[0].contiguous(), group=group)
            return received, busiest
        # [P, g, P, L] from rank, granule, to rank, expert
        everything = sent.new_empty(group.size(), *sent.shape)
        dist.all_gather_into_tensor(everything.flatten(0, 1), sent, group=group)
    busiest = everything.sum((0, 3), dtype=sent.dtype).amax(1)
    # a copy: a view would keep what all ranks trade
    return everything[:, :, group.rank()].transpose(0, 1).contiguous(), busiest


def _runs(busiest: list[int], most_granules: int, most_rows: int) -> list[tuple[int, int]]:
    """Join granules to tiles, the same on all ranks; each has at least one.

    Example: rows [4, 4, 9, 1, 1], most_granules 2, most_rows 8 -> (0, 2), (2, 3), (3, 5).
    """
    runs, first, rows = [], 0, 0
    for number, more in enumerate(busiest):
        if number > first and (number - first == most_granules or rows + more > most_rows):
            runs.append((first, number))
            first, rows = number, 0
        rows += more
    return [*runs, (first, len(busiest))]


def _count(experts: Tensor, num_experts: int, num_granules: int, granule: int) -> Tensor:
    """Count tokens by granule and expert: [T, k] -> [g, E] int32."""
    number = torch.arange(experts.shape[0], device=experts.device) // granule
    # no `bincount`, which waits for the device to learn the largest number
    at = (number.unsqueeze(1) * (num_experts + 1) + experts).flatten()
    counts = torch.zeros(num_granules * (num_experts + 1), dtype=torch.int32, device=experts.device)
    counts.scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))
    return counts.view(num_granules, -1)[:, :num_experts].contiguous()

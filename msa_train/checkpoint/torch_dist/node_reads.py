"""Read a checkpoint once on each node: what several ranks of a node want is read by one and sent to the rest.

    each rank     lists the regions that it wants, in pieces of 32 MiB at most
    all of a node exchange the lists; what one rank alone wants it reads on its own
    in rounds     each rank reads its share of what several want, 32 MiB at a time, and sends it to its node

Buffers are 64 MiB on each rank. A rank that cannot read takes part until the end and fails then, as the
others must not wait for it.

m3 on 256 ranks, pp 4, cp 64, ep 64, nodes of 8 ranks of one stage, by arithmetic: a rank alone wants 23.2
GB of experts and optimizer, the dense bf16 weights of its stage, 6.5 GB, are wanted by all 8. A node reads
192 GB and all nodes 6.1 TB, in place of 238 GB and 7.6 TB.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.checkpoint.torch_dist.regions import Region, RegionReader, in_pieces

PIECE_BYTES = 32 * 2**20
# of tensors in a buffer, a multiple of any element
_ALIGNED = 16

Wants = list[tuple[Region, Tensor]]
"regions with the places that they are for, of the same shape, of any type and device"


def read_wanted(wants: Wants, folder: Path, node: dist.ProcessGroup | None) -> None:
    """Read regions into their places. All ranks of a node call it.

    Args:
        wants: what this rank wants.
        folder: of the checkpoint.
        node: the ranks of this node; None: this rank alone.

    Raises:
        ValueError, OSError: the first that this rank met.
    """
    errors: list[Exception] = []
    places: dict[Region, list[Tensor]] = {}
    for region, target in wants:
        for piece, part in _pieces(region, target):
            places.setdefault(piece, []).append(part)
    listed = [sorted(places)]
    if node is not None:
        listed = [[] for _ in range(node.size())]
        dist.all_gather_object(listed, sorted(places), group=node)
    shared = deal(listed)
    together = set(chain(*shared))
    with closing(RegionReader(folder)) as reader:
        for region in sorted(places):
            if region not in together:
                _attempt(reader, region, places[region], errors)
        if node is not None:
            _read_together(shared, places, reader, node, errors)
    if errors:
        raise errors[0]


def deal(listed: Sequence[Sequence[Region]]) -> list[list[Region]]:
    """Choose who reads what several ranks want: of those the one that has least to read for others.

    Args:
        listed: regions that each rank of the node wants.

    Returns:
        Regions that each rank reads for others and itself, in the order of the disk.
    """
    wanted_by: dict[Region, list[int]] = {}
    for rank, regions in enumerate(listed):
        for region in regions:
            wanted_by.setdefault(region, []).append(rank)
    load, dealt = [0] * len(listed), [[] for _ in listed]
    for region in sorted(wanted_by):
        ranks = wanted_by[region]
        if len(ranks) > 1:
            reader = min(ranks, key=lambda rank: load[rank])
            load[reader] += region.num_bytes
            dealt[reader].append(region)
    return dealt


def batches(regions: Sequence[Region], most: int = PIECE_BYTES) -> list[list[Region]]:
    """Put regions that follow each other together, up to so many bytes or one alone."""
    result: list[list[Region]] = []
    size = most
    for region in regions:
        if size + _padded(region) > most:
            result.append([])
            size = 0
        result[-1].append(region)
        size += _padded(region)
    return result


def _pieces(region: Region, target: Tensor) -> Wants:
    """Cut a region and its place into pieces that fit into a buffer."""
    found: Wants = []
    for box in in_pieces(region.wanted, PIECE_BYTES // region.item_bytes):
        begin = tuple(a + b for a, b in zip(region.begin, box.offsets, strict=True))
        found.append((replace(region, begin=begin, wanted=box.sizes), box.of(target)))
    return found


def _attempt(reader: RegionReader, region: Region, places: list[Tensor], errors: list[Exception]) -> None:
    """Read what this rank alone wants, straight to its place where that is possible."""
    try:
        first = places[0]
        is_direct = first.device.type == "cpu" and first.dtype == region.type and first.is_contiguous()
        source = first if is_direct else torch.empty(region.wanted, dtype=region.type)
        reader.read(region, source)
        for place in places[is_direct:]:
            place.copy_(source)
    except Exception as error:
        errors.append(error)


def _read_together(
    shared: list[list[Region]],
    places: dict[Region, list[Tensor]],
    reader: RegionReader,
    node: dist.ProcessGroup,
    errors: list[Exception],
) -> None:
    """Read and send round by round what several ranks of the node want."""
    ranks = dist.get_process_group_ranks(node)
    by_rank = [batches(regions) for regions in shared]
    for number in range(max(len(found) for found in by_rank)):
        # all read at once, then each sends
        turn = [found[number] if number < len(found) else [] for found in by_rank]
        own = _buffer(turn[node.rank()])
        try:
            for region, part in _parts(turn[node.rank()], own):
                reader.read(region, part)
        except Exception as error:
            errors.append(error)
        for sender, batch in enumerate(turn):
            if not batch:
                continue
            buffer = own if sender == node.rank() else _buffer(batch)
            dist.broadcast(buffer, src=ranks[sender], group=node)
            try:
                for region, part in _parts(batch, buffer):
                    for place in places.get(region, []):
                        place.copy_(part)
            except Exception as error:
                errors.append(error)


def _buffer(batch: list[Region]) -> Tensor:
    return torch.empty(sum(map(_padded, batch)), dtype=torch.uint8)


def _parts(batch: list[Region], buffer: Tensor) -> list[tuple[Region, Tensor]]:
    """Find the tensors of a batch in its buffer."""
    found, at = [], 0
    for region in batch:
        part = buffer[at : at + region.num_bytes].view(region.type).view(region.wanted)
        found.append((region, part))
        at += _padded(region)
    return found


def _padded(region: Region) -> int:
    return -(-region.num_bytes // _ALIGNED) * _ALIGNED

"""Deal what several ranks hold over all of them, so that each writes an even share of a checkpoint.

Shards that the same ranks hold are laid end to end, and every one of these ranks writes as many bytes of that
line as the others, to whole rows. So a tensor is cut at most once for each of its holders, whatever its size.

Example: ranks 0 and 1 both hold a [4, 8] and b [2, 8]: rank 0 writes rows 0 to 2 of a, rank 1 row 3 of a and
all of b. An optimizer that is cut over the ranks lists what nobody else holds; that stays where it is.

Who holds what is exchanged once for a run, 9 bytes for each shard, and taken from memory in later saves.

At 256 ranks, m3 with pp 4, cp 64 and ep 64: 450 shards on a rank are 4 KB sent and 1 MB received by each.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica

from msa_train.checkpoint.all_ranks import run_on_all_ranks
from msa_train.checkpoint.torch_dist.boxes import range_of
from msa_train.checkpoint.torch_dist.writer import Shards

_Line = list[ShardedTensor]


class Shares:
    """Know which ranks hold each shard. All ranks make one and call it alike.

    Args:
        group: all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._own: list[int] | None = None
        "names of this rank's shards when they were exchanged"
        self._holders: dict[int, list[int]] = {}
        "ranks by name of what they hold"

    def learn(self, shards: Shards) -> None:
        """Exchange who holds what, unless nothing has changed on any rank since it was exchanged.

        Args:
            shards: all that this rank holds, replicas included.
        """
        own = [shard_name(entry) for entry in _tensors(shards)]
        changed = own != self._own
        if any(run_on_all_ranks(lambda: changed, self.group)):
            self._holders = holders(run_on_all_ranks(lambda: own, self.group))
            self._own = own

    def own(self, shards: Shards) -> Shards:
        """Choose what this rank writes: an even share of what it holds with others, all of the rest.

        Args:
            shards: as `learn` saw them.

        Returns:
            By key: boxes, whose data are views of the shards, and objects.
        """
        return own_share(shards, self._holders, dist.get_rank())


def holders(names: Sequence[Iterable[int]]) -> dict[int, list[int]]:
    """Turn names by rank into ranks by name: [[7, 8], [8]] -> {7: [0], 8: [0, 1]}."""
    result: dict[int, list[int]] = {}
    for rank, listed in enumerate(names):
        for name in dict.fromkeys(listed):
            result.setdefault(name, []).append(rank)
    return result


def shard_name(entry: ShardedTensor) -> int:
    """Name a shard in 64 bits: the same on all ranks that hold it.

    Two of 100,000 shards have one name with a probability of 3e-10; the plan of the save would then lack one
    of them and be refused.
    """
    place = (entry.key, entry.global_offset, entry.local_shape, str(entry.dtype))
    return int.from_bytes(blake2b(repr(place).encode(), digest_size=8).digest())


def own_share(shards: Shards, holders: dict[int, list[int]], rank: int) -> Shards:
    """Cut this rank's share of everything that it holds; see the module.

    Args:
        shards: all that this rank holds.
        holders: ranks by name of the shard, in ascending order.
        rank: this one.
    """
    result: Shards = {}
    lines: dict[tuple[int, ...], dict[int, ShardedTensor]] = {}
    for entries in shards.values():
        for entry in entries:
            if isinstance(entry, ShardedTensor):
                name = shard_name(entry)
                lines.setdefault(tuple(holders[name]), {})[name] = entry
            elif is_main_replica(entry.replica_id):
                result.setdefault(entry.unique_key, []).append(entry)
    for ranks, line in lines.items():
        ordered = sorted(line.values(), key=lambda entry: (entry.key, entry.global_offset))
        for box in _part_of_line(ordered, ranks.index(rank), len(ranks)):
            result.setdefault(box.key, []).append(box)
    return result


def _part_of_line(line: _Line, place: int, count: int) -> _Line:
    """Cut the part of a line of shards that the holder at `place` of `count` writes."""
    sizes = [_num_bytes(entry) for entry in line]
    begin, end = (sum(sizes) * edge // count for edge in (place, place + 1))
    boxes: _Line = []
    at = 0
    for entry, size in zip(line, sizes, strict=True):
        first, stop = (_whole_rows(entry, edge - at) for edge in (begin, end))
        # without an element there is nothing to cut, but the tensor is to be declared
        boxes += range_of(entry, first, stop) if size or place else [entry]
        at += size
    return boxes


def _whole_rows(entry: ShardedTensor, num_bytes: int) -> int:
    """Count the elements before a cut at so many bytes, of whole rows; 0 or all where it is outside."""
    assert entry.data is not None, f"{entry.key} has no data to save"
    elements = max(0, min(num_bytes // entry.data.element_size(), entry.data.numel()))
    row = entry.local_shape[-1] if len(entry.local_shape) > 1 else 1
    return elements - elements % row if elements < entry.data.numel() else elements


def _num_bytes(entry: ShardedTensor) -> int:
    assert entry.data is not None, f"{entry.key} has no data to save"
    return entry.data.nbytes


def _tensors(shards: Shards) -> Iterable[ShardedTensor]:
    """Yield the tensors among the shards."""
    return (entry for entries in shards.values() for entry in entries if not isinstance(entry, ShardedObject))

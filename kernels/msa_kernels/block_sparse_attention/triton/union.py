"""Find what neighbouring queries read together, on the device and without waiting for it.

Shapes: T queries, M KV heads, K slots, N physical blocks; tiles of Q consecutive queries of one KV head, each
with L = Q * K places.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Union:
    """Hold the blocks that each tile's queries read, without repetition."""

    block: Tensor
    """[M, tiles, L] int32 physical blocks, ascending; places from the size on hold anything."""
    token: Tensor
    """[M, tiles, L] int64 positions of the blocks' first tokens."""
    readers: Tensor
    """[M, tiles, L] int32, bit i: query i of the tile reads the block."""
    size: Tensor
    """[M, tiles] int32 number of blocks."""

    def small(self, most: float) -> Tensor:
        """Return [1] int32, 1 where tiles have at most `most` blocks on average."""
        return (self.size.sum(dtype=torch.int64) <= most * self.size.numel()).to(torch.int32).view(1)


def build_union(
    block_table: Tensor, block: Tensor, block_size: int, num_queries: int, *, used: Tensor | None = None
) -> Union:
    """Collect the blocks of every `num_queries` consecutive queries of a KV head.

    Example (M 1, K 2): queries with blocks [0, 1], [1, -1] and [1, 3], two to a tile, give block [[0, 1], [1,
    3]], readers [[1, 3], [1, 1]] and size [2, 2].

    Args:
        block_table: [T, M, K] int64 physical block per slot, -1 for none; none twice in a row.
        block: [N] int64 global ids of the physical blocks.
        block_size: tokens per block.
        num_queries: queries of a tile, at most 31.
        used: [T, M, K], 0 for slots that are not read; None: all.

    Costs a sort of L values per tile and a dozen small kernels.
    """
    T, M, K = block_table.shape
    tiles = -(-T // num_queries)
    nothing = torch.iinfo(torch.int64).max
    member = torch.arange(T, device=block_table.device)[:, None, None] % num_queries
    there = block_table >= 0 if used is None else used.view(T, M, K) > 0
    # one number for block and query: equal blocks come side by side
    key = torch.where(there, block_table * num_queries + member, nothing)
    if tiles * num_queries > T:
        key = torch.cat((key, key.new_full((tiles * num_queries - T, M, K), nothing)))
    key = key.view(tiles, num_queries, M, K).permute(2, 0, 1, 3).flatten(2).sort(-1).values
    physical = key // num_queries
    is_first = key != nothing
    is_first[..., 1:] &= physical[..., 1:] != physical[..., :-1]
    # what is no pair goes to a place of its own behind the others, which is cut off
    place = torch.where(key == nothing, num_queries * K, is_first.cumsum(-1) - 1)
    shape = (*key.shape[:-1], num_queries * K + 1)
    unique = key.new_zeros(shape).scatter_(-1, place, torch.where(key == nothing, 0, physical))[..., :-1]
    bits = torch.where(key == nothing, 0, 1 << (key % num_queries))
    readers = key.new_zeros(shape).scatter_add_(-1, place, bits)[..., :-1]
    return Union(
        block=unique.to(torch.int32).contiguous(),
        token=block[unique] * block_size,
        readers=readers.to(torch.int32).contiguous(),
        size=is_first.sum(-1, dtype=torch.int32),
    )

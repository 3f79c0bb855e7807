"""Share what the ways to bring remote KV blocks to the queries have in common.

A session lives from the forward to the backward pass of one layer call.

Shapes: M KV heads, NB blocks of the pack, NL blocks per rank, P ranks, B block size, D head dim, Di index
head dim. A rank's own KV blocks are numbered head * NL + local block.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from msa_kernels.block_sparse_attention.types import BlockPool
from torch import Tensor

from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.kv_exchange.requests import global_block
from msa_train.parallel.kv_exchange.saved_tensors import SavedTensors
from msa_train.parallel.sharding.shard_layout import ShardLayout

# Gradients of a pool of N KV blocks: dkv [N, 2, B, D] and dk_index [N, B, Di] (None without the KL loss).
KvBlockGrads = tuple[Tensor, Tensor | None]


@dataclass(slots=True)
class KvSource:
    """Hold KV blocks that can be read, and where to find them."""

    pool: BlockPool
    "N KV blocks: keys and values [N, 2, B, D], and ids"
    physical_block: Tensor
    "[M, NB] int64 place in the pool of every KV block of the pack, -1 if absent"

    def block_table(self, block_indices: Tensor) -> Tensor:
        """Look up block ids [T, M, topk] -> physical blocks [T, M, topk] int64, -1 where not in this pool.

        Example: physical_block [[4, -1, 7]] maps ids [[[2, 1, -1]]] to [[[7, -1, -1]]].
        """
        num_kv_heads = self.physical_block.shape[0]
        # Column 0 stands for id -1, so that empty slots need no mask.
        table = torch.nn.functional.pad(self.physical_block, (1, 0), value=-1)
        ids = block_indices.long().permute(1, 0, 2).reshape(num_kv_heads, -1) + 1
        found = table.gather(1, ids).view(num_kv_heads, block_indices.shape[0], -1)
        return found.permute(1, 0, 2)


class Compute(Protocol):
    """Form the gradients of a source."""

    def __call__(self, source: KvSource, rows: slice | None = None) -> KvBlockGrads:
        """Take the queries of these rows; None: all."""
        ...


class ExchangeSession(SavedTensors, ABC):
    """Exchange KV blocks of one layer call: sources for the forward, their gradients in the backward."""

    def __init__(self, local: Tensor, num_kv_heads: int, layout: ShardLayout, comm: KvComm) -> None:
        """Take over `local` [M * NL, 2, B, D], own keys and values by KV block; nothing is sent yet."""
        super().__init__(local)
        self.num_kv_heads, self.layout, self.comm = num_kv_heads, layout, comm

    @abstractmethod
    def sources(self) -> Iterator[KvSource]:
        """Yield pools that together hold every KV block this rank's queries selected, each in one pool only.

        Raises:
            ExchangeError: a collective failed.
        """

    @abstractmethod
    def backward(self, compute: Compute) -> KvBlockGrads:
        """Call `compute` on every source and return the gradients of own KV blocks, summed over ranks.

        Raises:
            ExchangeError: a collective failed.
        """

    def own_source(self) -> KvSource:
        """Make a source of this rank's own KV blocks."""
        return self.shard_source(self.local, range(self.layout.cp_rank, self.layout.cp_rank + 1))

    def shard_source(self, kv: Tensor, owners: range) -> KvSource:
        """Make a source of whole shards: kv [len(owners) * M * NL, 2, B, D], shard after shard.

        Example: one head, rank 0 has blocks 0 and 3, rank 1 blocks 1 and 2; the shard of rank 1 alone ->
        physical_block [[-1, 0, 1, -1]].
        """
        local, device = self.layout.num_local_blocks, kv.device
        physical_block = torch.full(
            (self.num_kv_heads, self.layout.num_blocks), -1, dtype=torch.int64, device=device
        )
        owner = torch.arange(owners.start, owners.stop, device=device).view(-1, 1, 1)
        group = torch.arange(self.num_kv_heads, device=device).view(1, -1, 1)
        block = global_block(owner, torch.arange(local, device=device).view(1, 1, -1), self.layout)
        block = block.expand(-1, self.num_kv_heads, -1)
        physical_block[group, block] = torch.arange(kv.shape[0], device=device).view(block.shape)
        return KvSource(pool=BlockPool(kv=kv, block=block.flatten()), physical_block=physical_block)


def add_in_rank_order(total: KvBlockGrads, pairs: Tensor, rows: Tensor, sizes: list[int]) -> None:
    """Add returned gradients to those of own KV blocks, one sender after the other: arrival changes nothing.

    Args:
        total: dkv [N, 2, B, D] and dk_index [N, B, Di] or None, changed in place.
        pairs: [R] int64 entries of `total`, no entry twice for one sender.
        rows: [R, 2 * B * D (+ B * Di)] in the order of `pairs`.
        sizes: rows of each sender.
    """
    dkv, dk_index = total
    width = dkv[0].numel()
    for place, part in zip(pairs.split(sizes), rows.split(sizes), strict=True):
        if part.shape[0] == 0:
            continue
        # Sent in the dtype of keys and values, summed in that of the own gradients, fp32 at least.
        part = part.to(dkv.dtype)
        dkv.index_add_(0, place, part[:, :width].view(-1, *dkv.shape[1:]))
        if dk_index is not None:
            dk_index.index_add_(0, place, part[:, width:].view(-1, *dk_index.shape[1:]))


def grad_rows(grads: KvBlockGrads, dtype: torch.dtype) -> Tensor:
    """Lay out the gradients of a pool as rows for the wire: [N, 2 * B * D (+ B * Di)]."""
    dkv, dk_index = grads
    width = dkv[:1].numel()
    rows = dkv.new_empty(dkv.shape[0], width + (0 if dk_index is None else dk_index[:1].numel()), dtype=dtype)
    # joined and cast at once: with all blocks fetched these rows are the largest tensors of a step
    rows[:, :width].view(dkv.shape).copy_(dkv)
    if dk_index is not None:
        rows[:, width:].view(dk_index.shape).copy_(dk_index)
    return rows

"""Three ways to bring remote key/value blocks to the queries, and their gradients back to the owners.

Each gives the same numbers. A session lives from the forward to the backward pass of one layer call.

Shapes: M KV groups, NB blocks of the pack, NL blocks per rank, P ranks, B block size, D head dim, Di index
head dim. A rank's own pairs (group, block) are numbered group * NL + local block.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from msa_kernels.block_sparse_attention.pool import BlockPool
from torch import Tensor

from msa_train.config import KvExchange
from msa_train.parallel.block_requests import BlockRequests, exchange_requests
from msa_train.parallel.collectives import CpComm
from msa_train.parallel.layout import ShardLayout

# Gradients of a pool: dkv [N, 2, B, D] and dk_index [N, B, Di] (None without the KL loss).
PairGrads = tuple[Tensor, Tensor | None]


@dataclass(slots=True)
class KvSource:
    """Readable pairs and where to find them. entry_of: [M, NB] int64 pool entry of a pair, -1 if absent."""

    pool: BlockPool
    entry_of: Tensor

    def entries(self, block_indices: Tensor) -> Tensor:
        """Block ids [T, M, topk] -> pool entries [T, M, topk] int64, -1 where not in this pool.

        Example: entry_of [[4, -1, 7]] maps ids [[[2, 1, -1]]] to [[[7, -1, -1]]].
        """
        num_groups = self.entry_of.shape[0]
        table = torch.nn.functional.pad(self.entry_of, (1, 0), value=-1)
        ids = block_indices.long().permute(1, 0, 2).reshape(num_groups, -1) + 1
        found = table.gather(1, ids).view(num_groups, block_indices.shape[0], -1)
        return found.permute(1, 0, 2)


class ExchangeSession(ABC):
    """One layer call: sources for the forward, gradients of all sources in the backward."""

    def __init__(self, local: Tensor, num_groups: int, layout: ShardLayout, comm: CpComm) -> None:
        """local: [M * NL, 2, B, D], this rank's keys and values by pair."""
        self.local, self.num_groups, self.layout, self.comm = local, num_groups, layout, comm

    @abstractmethod
    def sources(self) -> Iterator[KvSource]:
        """Pools that together hold every pair this rank's queries selected."""

    @abstractmethod
    def backward(self, compute: Callable[[KvSource], PairGrads]) -> PairGrads:
        """Call `compute` on every source and return the summed gradients of this rank's own pairs."""

    def shard_source(self, kv: Tensor, owners: range) -> KvSource:
        """Pool of whole shards: kv [len(owners) * M * NL, 2, B, D], shard after shard."""
        local, device = self.layout.num_local_blocks, kv.device
        ids = self.layout.blocks(device)[owners.start : owners.stop]
        block = ids[:, None].expand(-1, self.num_groups, -1).flatten()
        entry_of = torch.full((self.num_groups, self.layout.num_blocks), -1, dtype=torch.int64, device=device)
        entries = torch.arange(kv.shape[0], device=device).view(len(owners), self.num_groups, local)
        entry_of[:, ids.flatten()] = entries.transpose(0, 1).flatten(1)
        return KvSource(pool=BlockPool(kv=kv, block=block), entry_of=entry_of)


class SelectedSession(ExchangeSession):
    """Only the pairs that some local query selected travel, and only their gradients return."""

    def __init__(
        self,
        local: Tensor,
        num_groups: int,
        layout: ShardLayout,
        comm: CpComm,
        needed: Tensor,
        requests: BlockRequests | None,
    ) -> None:
        """needed: [M, NB] bool; requests: what was agreed before, when a layer is recomputed."""
        super().__init__(local, num_groups, layout, comm)
        self.requests = requests or exchange_requests(needed, layout, comm)
        self._source: KvSource | None = None

    def sources(self) -> Iterator[KvSource]:
        asked = self.requests
        payload = self.local.index_select(0, asked.send_pairs)
        fetched = self.comm.all_to_all(payload, asked.send, asked.receive, "kv")
        own = self.shard_source(self.local, range(self.layout.cp_rank, self.layout.cp_rank + 1))
        num_own = self.local.shape[0]
        own.entry_of[asked.receive_group, asked.receive_block] = torch.arange(
            num_own, num_own + fetched.shape[0], device=fetched.device
        )
        pool = BlockPool(
            kv=torch.cat((self.local, fetched)), block=torch.cat((own.pool.block, asked.receive_block))
        )
        self._source = KvSource(pool=pool, entry_of=own.entry_of)
        yield self._source

    def backward(self, compute: Callable[[KvSource], PairGrads]) -> PairGrads:
        assert self._source is not None, "the backward follows the forward"
        asked, num_own, wire = self.requests, self.local.shape[0], self.local.dtype
        dkv, dk_index = compute(self._source)
        parts = [dkv[num_own:].flatten(1)]
        if dk_index is not None:
            parts.append(dk_index[num_own:].flatten(1))
        payload = torch.cat(parts, dim=1).to(wire)
        returned = self.comm.all_to_all(payload, asked.receive, asked.send, "kv_grad")
        dkv, width = dkv[:num_own], parts[0].shape[1]
        dk_index = None if dk_index is None else dk_index[:num_own]
        # One requester after the other, in rank order: the sum does not depend on arrival.
        for pairs, rows in zip(asked.send_pairs.split(asked.send), returned.split(asked.send), strict=True):
            rows = rows.to(dkv.dtype)
            dkv.index_add_(0, pairs, rows[:, :width].view(-1, *dkv.shape[1:]))
            if dk_index is not None:
                dk_index.index_add_(0, pairs, rows[:, width:].view(-1, *dk_index.shape[1:]))
        return dkv, dk_index


class AllGatherSession(ExchangeSession):
    """Every rank gets all keys and values, in the backward once more; gradients are reduce-scattered."""

    def sources(self) -> Iterator[KvSource]:
        yield self._gathered("kv")

    def backward(self, compute: Callable[[KvSource], PairGrads]) -> PairGrads:
        dkv, dk_index = compute(self._gathered("kv_again"))
        own = self._scatter(dkv)
        return own, None if dk_index is None else self._scatter(dk_index)

    def _gathered(self, purpose: str) -> KvSource:
        kv = self.comm.all_gather(self.local, purpose).flatten(0, 1)
        return self.shard_source(kv, range(self.layout.cp_size))

    def _scatter(self, grad: Tensor) -> Tensor:
        shards = grad.view(self.layout.cp_size, -1, *grad.shape[1:]).to(self.local.dtype)
        return self.comm.reduce_scatter(shards, "kv_grad").to(grad.dtype)


class RingSession(ExchangeSession):
    """Shards move around a ring, one at a time; in the backward their gradients travel along."""

    def sources(self) -> Iterator[KvSource]:
        held = self.local
        for step in range(self.layout.cp_size):
            last = step == self.layout.cp_size - 1
            pending = None if last else self.comm.shift([held], "kv")
            yield self._held_source(held, step)
            if pending is not None:
                (held,) = pending.wait()

    def backward(self, compute: Callable[[KvSource], PairGrads]) -> PairGrads:
        held, sums = self.local, None
        for step in range(self.layout.cp_size):
            last = step == self.layout.cp_size - 1
            pending = None if last else self.comm.shift([held], "kv_again")
            grads = [x for x in compute(self._held_source(held, step)) if x is not None]
            if sums is not None:
                grads = [a.add_(b) for a, b in zip(sums, grads, strict=True)]
            # After the last step the sums go to the next rank once more: home to the shard's owner.
            sums = self.comm.shift(grads, "kv_grad").wait()
            if pending is not None:
                (held,) = pending.wait()
        assert sums is not None, "a ring has at least one rank"
        return sums[0], sums[1] if len(sums) > 1 else None

    def _held_source(self, held: Tensor, step: int) -> KvSource:
        owner = (self.layout.cp_rank - step) % self.layout.cp_size
        return self.shard_source(held, range(owner, owner + 1))


def open_session(
    kind: KvExchange,
    local: Tensor,
    needed: Tensor,
    layout: ShardLayout,
    comm: CpComm,
    requests: BlockRequests | None,
) -> ExchangeSession:
    """Start the exchange of one layer call.

    Args:
        kind: which way.
        local: [M * NL, 2, B, D] this rank's keys and values by pair.
        needed: [M, NB] bool, pairs that local queries selected.
        layout, comm: this rank's shard and collectives.
        requests: agreed requests of an earlier identical call, for `selected`.
    """
    num_groups = needed.shape[0]
    if kind is KvExchange.selected:
        return SelectedSession(local, num_groups, layout, comm, needed, requests)
    session = AllGatherSession if kind is KvExchange.all_gather else RingSession
    return session(local, num_groups, layout, comm)

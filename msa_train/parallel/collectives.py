"""Collectives that count the bytes they bring from other ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two and warns about the old names; 2.11 has only the old ones.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(slots=True)
class Traffic:
    """Bytes that this rank received from other ranks, by purpose (`kv`, `kv_grad`, `index_key`, ...)."""

    received: dict[str, int] = field(default_factory=dict)

    def add(self, purpose: str, num_bytes: int) -> None:
        """Count `num_bytes` more."""
        self.received[purpose] = self.received.get(purpose, 0) + num_bytes

    def __getitem__(self, purpose: str) -> int:
        return self.received.get(purpose, 0)


@dataclass(slots=True)
class CpComm:
    """Context-parallel collectives of one rank. group None: a single rank, nothing is sent."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    traffic: Traffic = field(default_factory=Traffic)

    def all_gather(self, x: Tensor, purpose: str) -> Tensor:
        """x of every rank, stacked: [...] -> [size, ...]."""
        if self.size == 1:
            return x.unsqueeze(0)
        out = x.new_empty(self.size, *x.shape)
        _gather(out.flatten(0, 1), x.contiguous(), group=self.group)
        self.traffic.add(purpose, (self.size - 1) * x.numel() * x.element_size())
        return out

    def reduce_scatter(self, x: Tensor, purpose: str) -> Tensor:
        """Sum over ranks of slice `rank`: [size, ...] -> [...]."""
        if self.size == 1:
            return x[0]
        out = torch.empty_like(x[0])
        _reduce_scatter(out, x.contiguous().flatten(0, 1), group=self.group)
        self.traffic.add(purpose, (self.size - 1) * out.numel() * x.element_size())
        return out

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], purpose: str) -> Tensor:
        """Rows of x, `send[r]` of them to rank r in order -> `receive[r]` rows from each rank r in order."""
        out = x.new_empty(sum(receive), *x.shape[1:])
        if self.size == 1:
            return out.copy_(x)
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self.group)
        row_bytes = math.prod(x.shape[1:]) * x.element_size()
        self.traffic.add(purpose, (sum(receive) - receive[self.rank]) * row_bytes)
        return out

    def shift(self, tensors: Sequence[Tensor], purpose: str) -> "PendingShift":
        """Start sending tensors to the next rank of the ring and receiving the previous rank's."""
        incoming = [torch.empty_like(x) for x in tensors]
        if self.size == 1:
            return PendingShift(list(tensors), [])
        assert self.group is not None, "a ring of several ranks has a group"
        after = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        before = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        operations = []
        for out, x in zip(incoming, tensors, strict=True):
            operations.append(dist.P2POp(dist.isend, x.contiguous(), after, self.group))
            operations.append(dist.P2POp(dist.irecv, out, before, self.group))
            self.traffic.add(purpose, x.numel() * x.element_size())
        return PendingShift(incoming, dist.batch_isend_irecv(operations), keep=operations)


@dataclass(slots=True)
class PendingShift:
    """Tensors on their way around the ring."""

    tensors: list[Tensor]
    works: list[dist.Work]
    keep: list[dist.P2POp] = field(default_factory=list)
    "holds the sent buffers until they have left"

    def wait(self) -> list[Tensor]:
        """Block until the previous rank's tensors are here and the own ones have left."""
        for work in self.works:
            work.wait()
        self.keep.clear()
        return self.tensors

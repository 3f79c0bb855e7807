"""Many ranks of one context-parallel group as threads of one process, for what only many ranks show.

Collectives hand tensors over in memory and add in the order and dtype of the real ones on a CPU. Nothing is
measured and nothing overlaps.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from msa_train.parallel.comm.cp_comm import CpComm, Pending

_Result = TypeVar("_Result")


class _Meeting:
    """Where all ranks hand something over and see what the others have."""

    def __init__(self, size: int) -> None:
        self.posted: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=120)

    def exchange(self, rank: int, mine: Any) -> list[Any]:
        self.posted[rank] = mine
        self.barrier.wait()
        found = list(self.posted)
        # nobody posts the next before all have read
        self.barrier.wait()
        return found


class ThreadComm(CpComm):
    """A rank's collectives."""

    def __init__(self, meeting: _Meeting, rank: int, size: int) -> None:
        super().__init__(None, rank, size)
        self.meeting = meeting

    def start_all_gather(self, x: Tensor, purpose: str, out: Tensor | None = None) -> Pending[Tensor]:
        found = torch.stack(self.meeting.exchange(self.rank, x.clone()))
        return self._done(found if out is None else out.copy_(found), purpose)

    def start_reduce_scatter(self, x: Tensor, purpose: str) -> Pending[Tensor]:
        everyone = self.meeting.exchange(self.rank, x.clone())
        # as a ring adds: the next rank begins, the own part comes last
        order = [(self.rank + step) % self.size for step in range(1, self.size + 1)]
        total = everyone[order[0]][self.rank].clone()
        for rank in order[1:]:
            total.add_(everyone[rank][self.rank])
        return self._done(total, purpose)

    def start_all_to_all(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], purpose: str, out: Tensor | None = None
    ) -> Pending[Tensor]:
        everyone = self.meeting.exchange(self.rank, x.split(list(send)))
        found = torch.cat([parts[self.rank] for parts in everyone])
        assert [parts[self.rank].shape[0] for parts in everyone] == list(receive)
        return self._done(found if out is None else out.copy_(found), purpose)

    def shift(self, tensors: Sequence[Tensor], purpose: str) -> Pending[list[Tensor]]:
        everyone = self.meeting.exchange(self.rank, [x.clone() for x in tensors])
        return self._done(everyone[(self.rank - 1) % self.size], purpose)


def run_threads(size: int, work: Callable[[ThreadComm], _Result]) -> list[_Result]:
    """Call `work` on every rank, each in a thread of its own; what they return, by rank."""
    meeting = _Meeting(size)

    def one(rank: int) -> _Result:
        try:
            return work(ThreadComm(meeting, rank, size))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))

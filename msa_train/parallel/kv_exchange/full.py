"""Three ways to bring keys and values to the queries of a dense layer, and their gradients back.

Each gives the same numbers. A session lives from the forward to the backward pass of one layer call; in
between autograd has its tensors.

Shapes: K keys that this rank holds, M KV groups, D head dim, S tokens of the pack.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from msa_train.config import KvExchange
from msa_train.parallel.comm.cp_comm import CpComm, Pending
from msa_train.parallel.kv_exchange.full_plan import FullPlan
from msa_train.parallel.kv_exchange.saved_tensors import SavedTensors
from msa_train.parallel.sharding.partition import Range
from msa_train.parallel.sharding.shard_layout import ShardLayout


@dataclass(slots=True)
class KeySource:
    """Keys and values that are here: kv [n, 2, M, D], the positions of its rows in ascending ranges."""

    kv: Tensor
    ranges: Sequence[Range]

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(row, start, stop) of each range."""
        row = 0
        for start, stop in self.ranges:
            yield row, start, stop
            row += stop - start


class FullSession(SavedTensors, ABC):
    """One layer call. local: [K, 2, M, D] keys and values of this rank, by its key plan. keep: fetched rows
    until the backward pass, where they would else be fetched again."""

    def __init__(
        self, local: Tensor, plan: FullPlan, layout: ShardLayout, comm: CpComm, *, keep: bool = True
    ) -> None:
        super().__init__(local)
        self.plan, self.layout, self.comm, self.keep = plan, layout, comm, keep

    @abstractmethod
    def sources(self) -> Iterator[KeySource]:
        """Keys that together hold all that this rank's queries see."""

    @abstractmethod
    def backward(self, compute: Callable[[KeySource], Tensor]) -> Tensor:
        """Call `compute` on every source; returns the summed gradient of `local`."""


class FullSelectedSession(FullSession):
    """Only what the queries of a rank see travels: documents up to its last query in them.

    Attention over own keys runs meanwhile; in the backward pass gradients return under it.
    """

    def sources(self) -> Iterator[KeySource]:
        """See FullSession.sources."""
        pending = self._start("full_kv")
        yield self._own()
        fetched = self._arrived(pending)
        if self.keep:
            self._fetched = fetched
        if self.plan.needed:
            yield KeySource(fetched, self.plan.needed)

    def backward(self, compute: Callable[[KeySource], Tensor]) -> Tensor:
        """See FullSession.backward; added in rank order after the own share, whatever arrives first."""
        if self._fetched is not None:
            returning = self._return(compute, self._fetched)
            self._fetched = None
            own = compute(self._own())
        else:
            pending = self._start("full_kv_again")
            own = compute(self._own())
            returning = self._return(compute, self._arrived(pending))
        moves, returned = self.plan.fetch, returning.wait()
        for rows, share in zip(moves.sent.split(moves.send), returned.split(moves.send), strict=True):
            own.index_add_(0, rows, share)
        return own

    def _own(self) -> KeySource:
        return KeySource(self.local, self.plan.key_plan.ranges[self.comm.rank])

    def _start(self, purpose: str) -> Pending[Tensor]:
        moves = self.plan.fetch
        return self.comm.start_all_to_all(self.local[moves.sent], moves.send, moves.receive, purpose)

    def _arrived(self, pending: Pending[Tensor]) -> Tensor:
        """In the order of the pack: [needed, 2, M, D]."""
        rows = pending.wait()
        return rows if self.plan.fetch.in_order else rows[self.plan.fetch.received.argsort()]

    def _return(self, compute: Callable[[KeySource], Tensor], fetched: Tensor) -> Pending[Tensor]:
        grad, moves = fetched, self.plan.fetch
        if self.plan.needed:
            grad = compute(KeySource(fetched, self.plan.needed))
        grad = grad if moves.in_order else grad[moves.received]
        return self.comm.start_all_to_all(grad, moves.receive, moves.send, "full_kv_grad")


class FullAllGatherSession(FullSession):
    """Every rank gets all keys and values, in the backward once more; gradients are reduce-scattered."""

    def sources(self) -> Iterator[KeySource]:
        yield self._gathered("full_kv")

    def backward(self, compute: Callable[[KeySource], Tensor]) -> Tensor:
        grad = self.layout.by_owner(compute(self._gathered("full_kv_again")))
        return self.comm.reduce_scatter(grad, "full_kv_grad")

    def _gathered(self, purpose: str) -> KeySource:
        gathered = self.layout.in_order(self.comm.all_gather(self.local, purpose))
        return KeySource(gathered, ((0, self.layout.seq_len),))


class FullRingSession(FullSession):
    """Shards move around a ring, each under the work on the one before; so do their gradients."""

    def sources(self) -> Iterator[KeySource]:
        held, size = self.local, self.comm.size
        for step in range(size):
            pending = None if step == size - 1 else self.comm.shift([held], "full_kv")
            yield self._source(held, step)
            if pending is not None:
                (held,) = pending.wait()

    def backward(self, compute: Callable[[KeySource], Tensor]) -> Tensor:
        held, size, returning = self.local, self.comm.size, None
        for step in range(size):
            pending = None if step == size - 1 else self.comm.shift([held], "full_kv_again")
            grad = compute(self._source(held, step))
            if returning is not None:
                grad += returning.wait()[0]
            if size == 1:
                return grad
            # After the last step the sum goes to the next rank once more: home to the shard's owner.
            returning = self.comm.shift([grad], "full_kv_grad")
            if pending is not None:
                (held,) = pending.wait()
        assert returning is not None, "a ring has at least one rank"
        return returning.wait()[0]

    def _source(self, held: Tensor, step: int) -> KeySource:
        owner = (self.comm.rank - step) % self.comm.size
        return KeySource(held, self.plan.key_plan.ranges[owner])


def open_full_session(
    kind: KvExchange, kv: Tensor, plan: FullPlan, layout: ShardLayout, comm: CpComm, *, keep: bool
) -> FullSession:
    """Start the exchange of one layer call; a single rank looks at its keys where they are."""
    if kind is KvExchange.ring or comm.size == 1:
        return FullRingSession(kv, plan, layout, comm)
    return (FullSelectedSession if kind is KvExchange.selected else FullAllGatherSession)(
        kv, plan, layout, comm, keep=keep
    )

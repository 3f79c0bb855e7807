"""Bring keys and values to the queries of a full-attention layer in one of three ways, and gradients back.

Each gives the same numbers. A session lives from the forward to the backward pass of one layer call; in
between autograd has its tensors.

The last rank of a document of 1M tokens on 256 ranks receives all keys and values whichever way is taken: 2
GiB (M = 4, D = 128, bf16), at once with `selected` and `all_gather`, 8 MiB at a time around the ring. Many
short documents are where `selected` spares bytes.

Shapes: K keys that this rank holds, M KV heads, D head dim, S tokens of the pack, P ranks.
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
    """Hold keys and values that are here."""

    kv: Tensor
    "[n, 2, M, D] keys and values"
    ranges: Sequence[Range]
    "positions of its rows in the pack, ascending"

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Yield (row, start, stop) of each range.

        Example: ranges [(0, 2), (6, 8)] -> (0, 0, 2), (2, 6, 8).
        """
        row = 0
        for start, stop in self.ranges:
            yield row, start, stop
            row += stop - start


class FullSession(SavedTensors, ABC):
    """Exchange keys and values of one layer call."""

    def __init__(
        self, local: Tensor, plan: FullPlan, layout: ShardLayout, comm: CpComm, *, keep: bool = True
    ) -> None:
        """Take over what is exchanged; nothing is sent yet.

        Args:
            local: [K, 2, M, D] keys and values of this rank, by its key plan.
            plan: of this pack.
            layout: the tokens of every rank.
            comm: ranks between which keys and values travel.
            keep: keep fetched rows until the backward pass, where they would else be fetched again.
        """
        super().__init__(local)
        self.plan, self.layout, self.comm, self.keep = plan, layout, comm, keep

    @abstractmethod
    def sources(self) -> Iterator[KeySource]:
        """Yield keys that together hold all that this rank's queries see."""

    @abstractmethod
    def backward(self, compute: Callable[[KeySource], Tensor]) -> Tensor:
        """Call `compute` on every source; return the gradient of `local` [K, 2, M, D], summed over ranks."""


class FullSelectedSession(FullSession):
    """Send only what the queries of a rank see: documents up to its last query in them.

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
        """See FullSession.backward; shares are added in rank order after the own one, as runs must repeat."""
        if self._fetched is not None:
            returning = self._return(compute, self._fetched)
            self._fetched = None
            own = compute(self._own())
        else:
            pending = self._start("full_kv_again")
            own = compute(self._own())
            returning = self._return(compute, self._arrived(pending))
        # One key may have been sent to many ranks: their gradients are summed here, over all that saw it.
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
        """Wait for fetched rows and put them into the order of the pack: [needed, 2, M, D].

        Example: rows that arrive belong at places [2, 3, 0, 1] -> rows 2, 3, 0, 1 of what arrived.
        """
        rows = pending.wait()
        return rows if self.plan.fetch.in_order else rows[self.plan.fetch.received.argsort()]

    def _return(self, compute: Callable[[KeySource], Tensor], fetched: Tensor) -> Pending[Tensor]:
        # A rank that fetched nothing still takes part in the all-to-all, with no rows.
        grad, moves = fetched, self.plan.fetch
        if self.plan.needed:
            grad = compute(KeySource(fetched, self.plan.needed))
        grad = grad if moves.in_order else grad[moves.received]
        return self.comm.start_all_to_all(grad, moves.receive, moves.send, "full_kv_grad")


class FullAllGatherSession(FullSession):
    """Gather all keys and values on every rank, in the backward once more; reduce-scatter gradients."""

    def sources(self) -> Iterator[KeySource]:
        yield self._gathered("full_kv")

    def backward(self, compute: Callable[[KeySource], Tensor]) -> Tensor:
        # Each rank has gradients of all keys from its own queries; summed over ranks, owners get theirs.
        grad = self.layout.by_owner(compute(self._gathered("full_kv_again")))
        return self.comm.reduce_scatter(grad, "full_kv_grad")

    def _gathered(self, purpose: str) -> KeySource:
        gathered = self.layout.in_order(self.comm.all_gather(self.local, purpose))
        return KeySource(gathered, ((0, self.layout.seq_len),))


class FullRingSession(FullSession):
    """Move shards around a ring, each under the work on the one before; so do their gradients.

    P - 1 messages of one shard each way: 255 of 8 MiB at 256 ranks and 1M tokens.
    """

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
        # Shards move to the next rank, so that of the rank before arrives first: rank 0 of 4 sees 0, 3, 2, 1.
        owner = (self.comm.rank - step) % self.comm.size
        return KeySource(held, self.plan.key_plan.ranges[owner])


def open_full_session(
    kind: KvExchange, kv: Tensor, plan: FullPlan, layout: ShardLayout, comm: CpComm, *, keep: bool
) -> FullSession:
    """Open the exchange of one layer call; a single rank looks at its keys where they are."""
    if kind is KvExchange.ring or comm.size == 1:
        return FullRingSession(kv, plan, layout, comm)
    return (FullSelectedSession if kind is KvExchange.selected else FullAllGatherSession)(
        kv, plan, layout, comm, keep=keep
    )

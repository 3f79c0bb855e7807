"""Bring keys and values to the queries of a full-attention layer in one of three ways, and gradients back.

Each gives the same numbers. A session lives from the forward to the backward pass of one layer call; in
between autograd has its tensors.

Gradients of a key are added over ranks in fp32 at least. Where each rank's share comes to the owner by itself
(`selected`, `ring`) it travels in the dtype of the keys, to which the kernel has rounded it already: fp32
would be twice the bytes for no better sum. A reduce-scatter (`all_gather`) adds on the way, so it is in fp32:
twice the bytes of bf16, and yet a quarter of what an all-to-all in bf16 would send over the network with 8
ranks to a node, as a ring through all nodes carries every byte into a node once.

The last rank of a document of 1M tokens on 256 ranks receives all keys and values whichever way is taken: 2
GiB (M = 4, D = 128, bf16), at once with `selected` and `all_gather`, 8 MiB at a time around the ring. Many
short documents are where `selected` spares bytes.

Shapes: K keys that this rank holds, M KV heads, D head dim, S tokens of the pack, P ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_train.config import KvExchange
from msa_train.parallel.comm.cp_comm import CpComm, Pending
from msa_train.parallel.comm.to_device import to_device
from msa_train.parallel.kv_exchange.full_plan import FullPlan
from msa_train.parallel.kv_exchange.saved_tensors import SavedTensors
from msa_train.parallel.sharding.partition import Range
from msa_train.parallel.sharding.shard_layout import ShardLayout

SLICE_BYTES = 2**29
"bytes of gradients of all ranks' keys that an all-gather session holds at once"


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


# Gives the gradient [n, 2, M, D] of a source's keys and values in this dtype.
Compute = Callable[[KeySource, torch.dtype], Tensor]


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

    @property
    def wide(self) -> torch.dtype:
        """Return the dtype in which gradients are added over ranks."""
        return torch.promote_types(self.local.dtype, torch.float32)

    @abstractmethod
    def sources(self) -> Iterator[KeySource]:
        """Yield keys that together hold all that this rank's queries see."""

    @abstractmethod
    def backward(self, compute: Compute) -> Tensor:
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

    def backward(self, compute: Compute) -> Tensor:
        """See FullSession.backward; shares are added in rank order after the own one, as runs must repeat."""
        if self._fetched is not None:
            returning = self._return(compute, self._fetched)
            self._fetched = None
            own = compute(self._own(), self.wide)
        else:
            pending = self._start("full_kv_again")
            own = compute(self._own(), self.wide)
            returning = self._return(compute, self._arrived(pending))
        # One key may have been sent to many ranks: their gradients are summed here, over all that saw it.
        moves, returned = self.plan.fetch, returning.wait()
        for rows, share in zip(moves.sent.split(moves.send), returned.split(moves.send), strict=True):
            own.index_add_(0, rows, share.to(own.dtype))
        return own.to(self.local.dtype)

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

    def _return(self, compute: Compute, fetched: Tensor) -> Pending[Tensor]:
        # A rank that fetched nothing still takes part in the all-to-all, with no rows.
        grad, moves = fetched, self.plan.fetch
        if self.plan.needed:
            grad = compute(KeySource(fetched, self.plan.needed), fetched.dtype)
        grad = grad if moves.in_order else grad[moves.received]
        return self.comm.start_all_to_all(grad, moves.receive, moves.send, "full_kv_grad")


class FullAllGatherSession(FullSession):
    """Gather all keys and values on every rank, in the backward once more; reduce-scatter gradients.

    Gradients go in slices, each of as many rows of every rank, under the work on the next: fp32 gradients of
    all keys, 4 GiB at 1M tokens (M = 4, D = 128), are never held at once.
    """

    def sources(self) -> Iterator[KeySource]:
        gathered = self.layout.in_order(self.comm.all_gather(self.local, "full_kv"))
        yield KeySource(gathered, ((0, self.layout.seq_len),))

    def backward(self, compute: Compute) -> Tensor:
        gathered = self.comm.all_gather(self.local, "full_kv_again")
        returning: list[Pending[Tensor]] = []
        sums: list[Tensor] = []
        for rows in self._slices():
            source, order = self._slice(gathered, rows)
            grad = compute(source, self.wide)
            if order is not None:
                grad = torch.empty_like(grad).index_copy_(0, order, grad)
            # Each rank has gradients of all keys from its own queries; summed over ranks, owners get theirs.
            shards = grad.view(self.comm.size, -1, *grad.shape[1:])
            # One slice's gradients travel while the next one's are made, and no more wait.
            sums += [returned.wait().to(self.local.dtype) for returned in returning]
            returning = [self.comm.start_reduce_scatter(shards, "full_kv_grad")]
        sums += [returned.wait().to(self.local.dtype) for returned in returning]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def _slices(self) -> Iterator[slice]:
        """Yield rows of a shard, as many at a time as SLICE_BYTES of all ranks' gradients allow."""
        num_rows = self.local.shape[0]
        row_bytes = self.comm.size * self.local[0].numel() * self.wide.itemsize
        step = max(SLICE_BYTES // row_bytes, 1)
        for first in range(0, num_rows, step):
            yield slice(first, min(first + step, num_rows))

    def _slice(self, gathered: Tensor, rows: slice) -> tuple[KeySource, Tensor | None]:
        """Make a source of the same rows of all shards [P, T, 2, M, D], in the order of the pack.

        Returns:
            The source; and its rows' places among the shards' rows, None where the order is the same.

        Example: 8 tokens in blocks of 2, zigzag over 2 ranks, rows 2..4: positions 6, 7 of rank 0 and 4, 5 of
        rank 1 -> a source of positions 4..8, places [2, 3, 0, 1].
        """
        held = [(*part, owner) for owner in range(self.comm.size) for part in self._cut(owner, rows)]
        places, count = [], 0
        for start, stop, _ in held:
            places.append(count)
            count += stop - start
        kv = gathered[:, rows].flatten(0, 1)
        if held == sorted(held):
            return KeySource(kv, [part[:2] for part in held]), None
        order = sorted(range(len(held)), key=held.__getitem__)
        index = torch.cat([torch.arange(places[i], places[i] + held[i][1] - held[i][0]) for i in order])
        index = to_device(index, kv.device)
        return KeySource(kv[index], [held[i][:2] for i in order]), index

    def _cut(self, owner: int, rows: slice) -> Iterator[Range]:
        """Yield positions of some rows of a shard: rows 1..3 of [(0, 2), (6, 8)] -> (1, 2), (6, 7)."""
        row = 0
        for start, stop in self.layout.plan.ranges[owner]:
            first, last = max(row, rows.start), min(row + stop - start, rows.stop)
            if first < last:
                yield start + first - row, start + last - row
            row += stop - start


class FullRingSession(FullSession):
    """Move shards around a ring, each under the work on the one before; gradients go straight to the owner.

    P - 1 messages of one shard each way: 255 of 8 MiB at 256 ranks and 1M tokens.
    """

    def sources(self) -> Iterator[KeySource]:
        held, size = self.local, self.comm.size
        for step in range(size):
            pending = None if step == size - 1 else self.comm.shift([held], "full_kv")
            yield self._source(held, step)
            if pending is not None:
                (held,) = pending.wait()

    def backward(self, compute: Compute) -> Tensor:
        """See FullSession.backward; shares are added in the order of the ranks after this one."""
        held, size = self.local, self.comm.size
        if size == 1:
            return compute(self._source(held, 0), held.dtype)
        total, returning = None, None
        for step in range(size):
            pending = None if step == size - 1 else self.comm.shift([held], "full_kv_again")
            # The first shard is this rank's own.
            grad = compute(self._source(held, step), held.dtype if step else self.wide)
            if total is None:
                total = grad
            else:
                arrived = returning
                returning = self._return(grad, step)
                if arrived is not None:
                    total += arrived.wait()
            if pending is not None:
                (held,) = pending.wait()
        assert total is not None, "a ring has at least one rank"
        assert returning is not None, "so far there were several ranks"
        total += returning.wait()
        return total.to(self.local.dtype)

    def _return(self, grad: Tensor, step: int) -> Pending[Tensor]:
        """Send the gradient of the shard of step n to the rank n before; get the own one from n after."""
        # A sum that travels along the ring would have to be fp32, twice the bytes, to be as exact.
        rank, size = self.comm.rank, self.comm.size
        send, receive = [0] * size, [0] * size
        send[(rank - step) % size] = receive[(rank + step) % size] = grad.shape[0]
        return self.comm.start_all_to_all(grad, send, receive, "full_kv_grad")

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

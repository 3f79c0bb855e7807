"""Broadcast KV blocks that nearly all ranks want: owners send them once and get one sum of gradients back.

Early blocks of a document are of this kind: sent one by one, their owner would send up to P - 1 times as much
as others receive, 255 copies at 256 ranks.

All broadcast blocks ("hot" in the code) lie one after the other in one buffer, which is cut in P equal
slices. Forward: every owner sends each rank what it owns of that rank's slice, then all slices are gathered.
Backward: each rank sums its slice of all ranks' gradients in rank order and sends the owners what is theirs.
With nodes both go by two steps, so that every slice crosses the network once per node. Each rank so receives
H / P and then H blocks, whoever owns them.

Shapes: P ranks, L of a node, N nodes, H broadcast blocks of all owners, E elements of one.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from msa_train.parallel.comm.cp_comm import CpComm, Pending
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.kv_exchange.plan import RankPlan


@dataclass(slots=True)
class HotSlices:
    """Hold how a buffer of H * E elements is cut.

    Example: 3 ranks, owners [0, 6, 6, 10]: slices of 4 elements [0, 4), [4, 8), [8, 12), the last one half
    empty; rank 0 sends 4, 2 and 0 elements, rank 2 sends 0, 2 and 2.
    """

    owners: list[int]
    "[P + 1] first element of each owner's blocks, and the end"
    slice_size: int
    "elements of a slice; the last slices may be partly empty"
    node_size: int
    "L; P without nodes"
    num_nodes: int
    "N; 1 without nodes"

    def slice_of(self, rank: int) -> int:
        """Number a rank's slice: those of a place in all nodes are neighbours, to gather in two steps.

        Example: ranks 0 to 3 on nodes of 2 -> slices 0, 2, 1, 3.
        """
        return rank % self.node_size * self.num_nodes + rank // self.node_size

    def span(self, owner: int, rank: int) -> tuple[int, int]:
        """Find the elements of the buffer that `owner` owns in `rank`'s slice; empty: start == stop.

        Example: owners [0, 6, 6, 10], slices of 4: span(0, 1) -> (4, 6), span(2, 1) -> (6, 8).
        """
        first = self.slice_of(rank) * self.slice_size
        start = max(first, self.owners[owner])
        return start, max(start, min(first + self.slice_size, self.owners[owner + 1]))


def cut(plan: RankPlan, elements: int, comm: KvComm) -> HotSlices:
    """Cut the buffer of all broadcast blocks, `elements` elements each, into slices."""
    # Slices are rounded up, so that all are equal; the end of the last ones is empty.
    owners = [blocks * elements for blocks in accumulate(plan.hot_rows, initial=0)]
    node_size = comm.size if comm.inner is None else comm.inner.size
    return HotSlices(owners, -(-owners[-1] // comm.size), node_size, comm.size // node_size)


class HotBroadcast:
    """Broadcast keys and values; started by its constructor, `finish` gives all broadcast blocks."""

    def __init__(self, own: Tensor, plan: RankPlan, comm: KvComm, purpose: str) -> None:
        """Send the own parts of all slices to their ranks.

        Args:
            own: [hot_rows[rank], ...] this rank's broadcast blocks, E elements each.
            plan: of this rank.
            comm: ranks between which KV blocks travel.
            purpose: of the bytes, without `_hot`.
        """
        self.comm, self.purpose = comm, f"{purpose}_hot"
        # A rank without such blocks knows their size from the shape of its empty tensor.
        elements = own[0].numel() if own.shape[0] else own.flatten(1).shape[1]
        self.slices = cut(plan, elements, comm)
        mine = [self.slices.span(comm.rank, rank) for rank in range(comm.size)]
        theirs = [self.slices.span(rank, comm.rank) for rank in range(comm.size)]
        first, flat = self.slices.owners[comm.rank], own.flatten()
        payload = torch.cat([flat[start - first : stop - first] for start, stop in mine])
        send, receive = ([stop - start for start, stop in spans] for spans in (mine, theirs))
        self.slice = own.new_zeros(self.slices.slice_size)
        part = self.slice[: sum(receive)]
        self.pending = comm.start_all_to_all(payload, send, receive, self.purpose, part)

    @property
    def num_elements(self) -> int:
        """Count the elements of the buffer that `finish` fills, the empty end included."""
        return self.slices.slice_size * self.comm.size

    def finish(self, out: Tensor) -> None:
        """Gather all slices into `out` [num_elements]."""
        self.pending.wait()
        comm, size = self.comm, self.slices.slice_size
        if comm.inner is None or comm.outer is None:
            comm.start_all_gather(self.slice, self.purpose, out.view(comm.size, size)).wait()
            return
        # Over the network one slice of each node, then all of them within the node.
        rail = comm.outer.start_all_gather(self.slice, self.purpose).wait().flatten()
        comm.inner.start_all_gather(rail, self.purpose, out.view(comm.inner.size, -1)).wait()


class HotReduce:
    """Sum all ranks' gradients of broadcast blocks at their owners; started by its constructor."""

    def __init__(self, rows: Tensor, plan: RankPlan, comm: KvComm) -> None:
        """Send each rank its slice of this rank's gradients.

        Args:
            rows: [H, E] this rank's gradients, zero where it did not want the block.
            plan: of this rank.
            comm: ranks between which KV blocks travel.
        """
        self.comm, self.purpose, self.width = comm, "kv_grad_hot", rows.shape[1]
        self.slices, self.dtype = cut(plan, rows.shape[1], comm), rows.dtype
        # Zeros at the end, so that all slices are equal and the all-to-all is even.
        missing = self.slices.slice_size * comm.size - rows.numel()
        buffer = torch.nn.functional.pad(rows.flatten(), (0, missing))
        # With nodes the sum inside the node comes first, and only it leaves the node.
        self.pending = self._scatter(buffer, comm if comm.inner is None else comm.inner)

    def leave_node(self) -> None:
        """Send the sums of this node's ranks on; without nodes there is nothing to do."""
        if self.comm.outer is not None:
            self.pending = self._scatter(self._sum(self.pending), self.comm.outer)

    def finish(self) -> Tensor:
        """Wait for the summed gradients of own broadcast blocks: [hot_rows[rank], E]."""
        comm, mine = self.comm, self._sum(self.pending)
        first = self.slices.slice_of(comm.rank) * self.slices.slice_size
        theirs = [self.slices.span(rank, comm.rank) for rank in range(comm.size)]
        own = [self.slices.span(comm.rank, rank) for rank in range(comm.size)]
        payload = torch.cat([mine[start - first : stop - first] for start, stop in theirs])
        send, receive = ([stop - start for start, stop in spans] for spans in (theirs, own))
        parts = comm.all_to_all(payload, send, receive, self.purpose).split(receive)
        # Own blocks lie in the slices one after the other: put the parts into the order of slices.
        order = sorted(range(comm.size), key=self.slices.slice_of)
        return torch.cat([parts[rank] for rank in order]).view(-1, self.width)

    def _scatter(self, buffer: Tensor, comm: CpComm) -> Pending[Tensor]:
        """Start sending an equal part of the buffer to each rank."""
        rows = buffer.view(comm.size, -1)
        return comm.start_all_to_all(rows, [1] * comm.size, [1] * comm.size, self.purpose)

    def _sum(self, pending: Pending[Tensor]) -> Tensor:
        """Add up what arrived, in rank order and in fp32 at least."""
        rows = pending.wait()
        total = rows[0].to(torch.promote_types(self.dtype, torch.float32))
        for row in rows[1:]:
            total = total + row
        return total.to(self.dtype)

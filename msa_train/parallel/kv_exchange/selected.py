"""Exchange `selected` KV blocks: those that some local query selected travel, their gradients return.

Attention over own KV blocks runs while others travel, own gradients are computed while others return.

A rank receives R + H KV blocks of 64 KiB (B = D = 128, bf16) and returns as many gradients, a half more with
index keys. At 1M tokens on 256 ranks all would be 32,640 (M = 4), 2 GiB; a tenth of them is 204 MiB.

Shapes: as in `session`; R fetched KV blocks, H broadcast blocks, E elements of one.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from msa_kernels.block_sparse_attention.types import BlockPool
from torch import Tensor

from msa_train.parallel.comm.cp_comm import CpComm, Pending
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.kv_exchange.cost_model import OWN_BEFORE
from msa_train.parallel.kv_exchange.hot_blocks import HotBroadcast, HotReduce
from msa_train.parallel.kv_exchange.plan import Hop, RankPlan
from msa_train.parallel.kv_exchange.requests import global_block
from msa_train.parallel.kv_exchange.session import (
    Compute,
    ExchangeSession,
    KvBlockGrads,
    KvSource,
    add_in_rank_order,
    grad_rows,
)
from msa_train.parallel.sharding.shard_layout import ShardLayout


class SlicedFetch(Protocol):
    """Bring KV blocks that slices of queries have asked for, one slice after the other."""

    def finish(self) -> Tensor:
        """Wait for all of them, in the order of the whole exchange's plan: [R + H, 2, B, D]."""
        ...


class SelectedSession(ExchangeSession):
    """Exchange as the plan says, flat or by nodes."""

    def __init__(
        self,
        local: Tensor,
        num_kv_heads: int,
        layout: ShardLayout,
        comm: KvComm,
        plan: RankPlan,
        *,
        keep_for_backward: bool,
        index_elements: int,
        begun: SlicedFetch | None = None,
    ) -> None:
        """Take over what is exchanged; nothing is sent yet.

        Args:
            local: [M * NL, 2, B, D] this rank's keys and values by KV block.
            num_kv_heads: M, KV heads.
            layout: this rank's shard.
            comm: ranks between which KV blocks travel.
            plan: agreed with all ranks.
            keep_for_backward: keep fetched KV blocks; False: fetch them again.
            index_elements: B * Di, gradients of a block's index keys that come back with it; 0 without the KL
                loss.
            begun: brings the KV blocks of the first pass, which are on their way; None: they are fetched.
        """
        super().__init__(local, num_kv_heads, layout, comm)
        self.plan, self.keep, self.index_elements = plan, keep_for_backward, index_elements
        self._begun = begun

    @property
    def _has_remote(self) -> bool:
        return self.plan.num_rows + self.plan.num_hot > 0

    def sources(self) -> Iterator[KvSource]:
        """See ExchangeSession.sources."""
        fetch = self._begun or Fetch(self.local, self.plan, self.comm, "kv")
        self._begun = None
        yield self.own_source()
        fetched = fetch.finish()
        del fetch
        if self.keep:
            self._fetched = fetched
        if self._has_remote:
            yield self._remote(fetched)

    def backward(self, compute: Compute) -> KvBlockGrads:
        """See ExchangeSession.backward."""
        if self._fetched is not None:
            # Remote gradients first, so that they travel while the own ones are computed.
            fetched, self._fetched = self._fetched, None
            grads = self._remote_grads(compute, fetched)
            # what was fetched is not needed any more, and its gradients are about to be copied
            del fetched
            returning = self._return(grads)
            del grads
            own = self._own_under(returning, compute)
        else:
            # Fetched again: own gradients are computed meanwhile, and the return is not hidden.
            fetch = Fetch(self.local, self.plan, self.comm, "kv_again")
            own = compute(self.own_source())
            returning = self._return(self._remote_grads(compute, fetch.finish()))
            returning.leave_node()
        returning.finish(own)
        return own

    def _own_under(self, returning: "_Return", compute: Compute) -> KvBlockGrads:
        """Compute own gradients while others return.

        With nodes some queries come before, and the others after the sums of the node leave it: ranks of a
        node end the gradients of others' blocks at different times, and need not wait for one another.
        """
        num_queries, source = self.layout.local_seq_len, self.own_source()
        before = int(num_queries * OWN_BEFORE) if len(self.plan.hops) > 1 else 0
        if before == 0:
            returning.leave_node()
            return compute(source)
        own = compute(source, slice(0, before))
        returning.leave_node()
        rest = compute(source, slice(before, num_queries))
        own[0].add_(rest[0])
        if own[1] is not None and rest[1] is not None:
            own[1].add_(rest[1])
        return own

    def _remote_grads(self, compute: Compute, fetched: Tensor) -> KvBlockGrads | None:
        return compute(self._remote(fetched)) if self._has_remote else None

    def _return(self, grads: KvBlockGrads | None) -> "_Return":
        return _Return(grads, self.plan, self.comm, self.local, self.index_elements)

    def _remote(self, fetched: Tensor) -> KvSource:
        """Make a source of fetched and broadcast blocks; own broadcast blocks are left to the other one."""
        plan, layout = self.plan, self.layout
        owner = torch.cat((plan.owner, plan.hot_owner))
        block = global_block(owner, torch.cat((plan.block_of_owner, plan.hot_block_of_owner)), layout)
        physical_block = torch.full(
            (self.num_kv_heads, layout.num_blocks), -1, dtype=torch.int64, device=block.device
        )
        place = torch.arange(block.shape[0], device=block.device)
        # Own broadcast blocks came back too; a KV block in two pools would be attended to twice.
        place = torch.where(owner == layout.cp_rank, -1, place)
        rows = plan.num_rows
        physical_block[plan.group, block[:rows]] = place[:rows]
        # What one slice of queries fetched may be broadcast in a later one: it is read at one place.
        physical_block[plan.hot_group, block[rows:]] = place[rows:]
        return KvSource(pool=BlockPool(kv=fetched, block=block), physical_block=physical_block)


class Fetch:
    """Fetch keys and values; started by the constructor."""

    def __init__(self, local: Tensor, plan: RankPlan, comm: KvComm, purpose: str) -> None:
        self.local, self.plan, self.comm, self.purpose = local, plan, comm, purpose
        # The broadcast starts first, for it takes two steps.
        self.hot = None
        if plan.num_hot:
            self.hot = HotBroadcast(local.index_select(0, plan.hot_pairs), plan, comm, purpose)
        spare = 0 if self.hot is None else self.hot.num_elements
        num_elements = plan.num_rows * local[0].numel()
        # One buffer: broadcast blocks arrive behind the others, so that nothing is copied to join them.
        self.buffer = local.new_empty(num_elements + spare)
        self.rows = self.buffer[:num_elements].view(plan.num_rows, *local.shape[1:])
        if len(plan.hops) == 1:
            self.first = send_rows(local, plan.hops[0], comm, purpose, self.rows)
        else:
            assert comm.outer is not None, "a plan with nodes comes with their groups"
            self.first = send_rows(local, plan.hops[0], comm.outer, f"{purpose}_outer")

    def finish(self) -> Tensor:
        """Wait for all fetched KV blocks, then all broadcast blocks: [R + H, 2, B, D]."""
        plan, comm = self.plan, self.comm
        transit = self.first.wait()
        if len(plan.hops) > 1:
            assert comm.inner is not None, "a plan with nodes comes with their groups"
            source = OwnAndTransit(self.local, transit)
            # Second hop: hand on within the node what came over the network, with own KV blocks.
            send_rows(source, plan.hops[1], comm.inner, self.purpose, self.rows).wait()
        num_elements = self.rows.numel()
        if self.hot is not None:
            self.hot.finish(self.buffer[num_elements:])
        total = (plan.num_rows + plan.num_hot) * self.local[0].numel()
        return self.buffer[:total].view(-1, *self.local.shape[1:])


class OwnAndTransit:
    """Read own KV blocks followed by rows in transit as one source of rows, without joining them."""

    def __init__(self, local: Tensor, transit: Tensor) -> None:
        self.local, self.transit = local, transit

    def index_select(self, dim: int, take: Tensor) -> Tensor:
        """Pick rows as torch does; with 2 own rows, [0, 3] is own row 0 and row 1 in transit."""
        num_own = self.local.shape[0]
        rows = self.local.index_select(dim, take.clamp(max=num_own - 1))
        if self.transit.shape[0] == 0:
            return rows
        other = self.transit.index_select(dim, (take - num_own).clamp(min=0))
        return torch.where((take < num_own).view(-1, *(1,) * (rows.dim() - 1)), rows, other)


def send_rows(
    source: "Tensor | OwnAndTransit", hop: Hop, comm: CpComm, purpose: str, out: Tensor | None = None
) -> Pending[Tensor]:
    """Begin one hop: pick its rows of the source and send them."""
    payload = source.index_select(0, hop.take)
    return comm.start_all_to_all(payload, hop.send, hop.receive, purpose, out)


class _Return:
    """Return gradients of fetched KV blocks to their owners; started by the constructor."""

    def __init__(
        self, grads: KvBlockGrads | None, plan: RankPlan, comm: KvComm, local: Tensor, index_elements: int
    ) -> None:
        """Send gradients the way the KV blocks came; with nodes summed inside the node first.

        Args:
            grads: of all fetched KV blocks, then broadcast ones; None where there are none.
            plan: of this rank.
            comm: ranks between which KV blocks travel.
            local: own KV blocks, for dtype and shape.
            index_elements: B * Di, see SelectedSession.
        """
        self.plan, self.comm, self.num_own = plan, comm, local.shape[0]
        if grads is None:
            rows = local.new_empty(0, local[0].numel() + index_elements)
        else:
            rows = grad_rows(grads, local.dtype)
        self.hot = HotReduce(rows[plan.num_rows :], plan, comm) if plan.num_hot else None
        rows, self.from_node = rows[: plan.num_rows], None
        self.dtype = rows.dtype
        last: CpComm = comm
        if len(plan.hops) > 1:
            assert comm.inner is not None, "a plan with nodes comes with their groups"
            last = comm.inner
        self.pending = _send_back(rows, plan.hops[-1], last, "kv_grad")

    def leave_node(self) -> None:
        """Sum what the node's ranks return and send it on; without nodes there is nothing to do."""
        plan, comm = self.plan, self.comm
        if self.hot is not None:
            self.hot.leave_node()
        if len(plan.hops) == 1:
            return
        assert comm.outer is not None, "a plan with nodes comes with their groups"
        returned = self.pending.wait()
        # This node's gradients of own KV blocks and of rows in transit, summed in rank order: only one sum of
        # each row crosses the network.
        dtype = torch.promote_types(self.dtype, torch.float32)
        num_rows = self.num_own + sum(plan.hops[0].receive)
        sums = torch.zeros(num_rows, returned.shape[1], dtype=dtype, device=returned.device)
        take, sizes = plan.hops[1].take, plan.hops[1].send
        for place, part in zip(take.split(sizes), returned.split(sizes), strict=True):
            if part.shape[0]:
                sums.index_add_(0, place, part.to(dtype))
        self.from_node = sums[: self.num_own]
        self.pending = _send_back(
            sums[self.num_own :].to(self.dtype), plan.hops[0], comm.outer, "kv_grad_outer"
        )

    def finish(self, own: KvBlockGrads) -> None:
        """Wait and add to the gradients of own KV blocks: by rank or by node, broadcast ones last."""
        hop, rows = self.plan.hops[0], self.pending.wait()
        if self.from_node is None:
            add_in_rank_order(own, hop.take, rows, hop.send)
        else:
            node = self.comm.rank // len(self.plan.hops[1].send)
            # The own node's sum has its turn among the nodes, so that the order does not depend on the rank.
            everyone = torch.arange(self.num_own, device=rows.device)
            for n, (place, part) in enumerate(
                zip(hop.take.split(hop.send), rows.split(hop.send), strict=True)
            ):
                if n == node:
                    add_in_rank_order(own, everyone, self.from_node, [self.num_own])
                else:
                    add_in_rank_order(own, place, part, [part.shape[0]])
        if self.hot is not None:
            pairs = self.plan.hot_pairs
            add_in_rank_order(own, pairs, self.hot.finish(), [pairs.shape[0]])


def _send_back(rows: Tensor, hop: Hop, comm: CpComm, purpose: str) -> Pending[Tensor]:
    return comm.start_all_to_all(rows, hop.receive, hop.send, purpose)

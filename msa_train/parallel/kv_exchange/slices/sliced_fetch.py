"""Fetch KV blocks for one slice of queries while the next one is scored.

Every slice goes three steps: a request to all ranks, rows over the first hop, rows over the second hop (with
nodes). On a CPU each call of `push` moves every slice one step on, so that what was launched travels until
the next call; on a GPU all steps are launched at once beside the scoring. A KV block travels with the first
slice that wants it and crosses to a node once. In the end rows stand where one exchange of everything
would have put them: attention, gradients and a recomputation know nothing of slices, and the numbers are the
same bit by bit but where broadcast blocks differ.

Cost: a request of 64 + P * W bytes for each slice, and one small host copy; at 1M tokens on 256 ranks 1 MiB
received for each slice, and its index lists. Fetched rows are held twice while they are put together.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msa_train.config import KvExchange
from msa_train.parallel.comm.cp_comm import Pending
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.kv_exchange.hot_blocks import HotBroadcast
from msa_train.parallel.kv_exchange.plan import Demand, ExchangeShape, RankPlan, node_union, plan_rank
from msa_train.parallel.kv_exchange.requests import (
    Agreement,
    ExchangeDecision,
    agree,
    kv_blocks_by_owner,
    start_request,
)
from msa_train.parallel.kv_exchange.rows.node_hops import Earlier, NodeView
from msa_train.parallel.kv_exchange.selected import OwnAndTransit, send_rows
from msa_train.parallel.kv_exchange.slices.last_call import Choices, LastCall
from msa_train.parallel.kv_exchange.slices.side_stream import join
from msa_train.parallel.sharding.shard_layout import ShardLayout


@dataclass(slots=True)
class _Slice:
    """Hold one slice's part of the exchange, as far as it has come."""

    request: Pending[Tensor]
    "of all ranks"
    plan: RankPlan | None = None
    "this rank's; None until the requests have been read"
    first: Pending[Tensor] | None = None
    "rows on the first of two hops"
    rows: Pending[Tensor] | None = None
    "rows on the last hop"
    hot: HotBroadcast | None = None
    "broadcast blocks of this slice, until they are gathered"
    hot_rows: Tensor | None = None
    "[H, 2, B, D] broadcast blocks"


@dataclass(slots=True)
class _Sum:
    """Add up the demand of all slices."""

    demand: Demand
    "of all slices so far"
    counts: list[int]
    "of `count_rows`"


@dataclass(slots=True)
class SlicedFetch:
    """Exchange selected KV blocks in slices of queries."""

    local: Tensor
    "[M * NL, 2, B, D] own keys and values by KV block"
    shape: ExchangeShape
    "of the exchange"
    layout: ShardLayout
    "this rank's shard"
    comm: KvComm
    "ranks between which KV blocks travel, of this layer"
    k_index: Tensor | None
    "[T, Di] own index keys, checked with the keys and values"
    num_slices: int
    "how often `push` will be called"
    choices: Choices | None = None
    "what `auto` chooses between in the layer's next call; None: nothing is to choose"
    needed: Tensor = field(init=False)
    "[M, NB] bool KV blocks that queries have selected so far"
    _have: Tensor = field(init=False)
    _slices: list[_Slice] = field(init=False, default_factory=list)
    _sum: _Sum | None = field(init=False, default=None)
    _earlier: Earlier | None = field(init=False, default=None)
    _transit: Tensor = field(init=False)
    _spoilt: bool = field(init=False, default=False)
    _plan: RankPlan | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        shape, device = self.shape, self.local.device
        self.needed = torch.zeros(shape.num_kv_heads, self.layout.num_blocks, dtype=torch.bool, device=device)
        self._have = torch.zeros(shape.cp_size, shape.num_kv_blocks, dtype=torch.bool, device=device)
        self._transit = self.local[:0]

    def push(self, needed: Tensor) -> None:
        """Ask for what one more slice of queries selected: [M, NB] bool.

        Raises:
            ExchangeError: a rank's request does not fit, or a collective failed; so do all below.
        """
        self._step()
        wanted = kv_blocks_by_owner(needed, self.layout) & ~self._have
        self._have |= wanted
        self.needed |= needed
        checked = (None, None) if self._slices else (self.k_index, self.local)
        self._slices.append(_Slice(start_request(wanted, self.shape, self.comm, checked)))
        if self.local.device.type == "cuda":
            self._finish_steps()

    def decide(self) -> ExchangeDecision:
        """Tell how KV blocks come; all requests are read then."""
        self._step()
        if self.local.device.type == "cuda":
            self._finish_steps()
        assert self._sum is not None, "there is at least one slice"
        self._plan = plan_rank(self._sum.demand, self.layout.cp_rank, self._sum.counts)
        return ExchangeDecision(KvExchange.selected, self._plan, spoilt=self._spoilt)

    def finish(self) -> Tensor:
        """Wait for everything, in the order of the whole plan: [R + H, 2, B, D]."""
        plan = self._plan
        assert plan is not None, "it was decided first"
        self._finish_steps()
        join(self.local.device)
        num_rows, shape = plan.num_rows, self.local.shape[1:]
        fetched = self.local.new_empty(num_rows + plan.num_hot, *shape)
        rows_at = self._places(plan.owner, plan.group, plan.block_of_owner)
        hot_at = self._places(plan.hot_owner, plan.hot_group, plan.hot_block_of_owner)
        for part in self._slices:
            ours = part.plan
            assert ours is not None, "all steps are done"
            assert part.rows is not None, "all steps are done"
            place = rows_at[self._number(ours.owner, ours.group, ours.block_of_owner)]
            fetched.index_copy_(0, place, part.rows.wait())
            if part.hot_rows is not None:
                place = hot_at[self._number(ours.hot_owner, ours.hot_group, ours.hot_block_of_owner)]
                fetched.index_copy_(0, place + num_rows, part.hot_rows)
        self._slices.clear()
        return fetched

    def _number(self, owner: Tensor, group: Tensor, block: Tensor) -> Tensor:
        return owner * self.shape.num_kv_blocks + group * self.shape.num_local_blocks + block

    def _places(self, owner: Tensor, group: Tensor, block: Tensor) -> Tensor:
        """Look up places in a list of KV blocks by owner and number: [P * NP] int64."""
        at = torch.zeros(self._have.numel(), dtype=torch.int64, device=owner.device)
        at[self._number(owner, group, block)] = torch.arange(owner.shape[0], device=owner.device)
        return at

    def _finish_steps(self) -> None:
        while any(part.rows is None or part.hot is not None for part in self._slices):
            self._step()

    def _step(self) -> None:
        """Move every slice one step on, the first one first: all ranks launch in the same order."""
        for part in self._slices:
            if part.plan is None:
                self._send(part, last=part is self._slices[-1] and len(self._slices) == self.num_slices)
            elif part.rows is None or part.hot is not None:
                self._hand_on(part)

    def _send(self, part: _Slice, *, last: bool) -> None:
        """Read the requests of a slice and send rows over the first hop, broadcast blocks before them."""
        rank, comm = self.layout.cp_rank, self.comm
        asks = self.choices is not None and last
        agreed = self.agree(part.request.wait(), self._loads if asks else None)
        plan = plan_rank(agreed.demand, rank, agreed.counts, self._earlier)
        part.plan, self._spoilt = plan, self._spoilt or agreed.spoilt
        self._add(agreed.demand, agreed.counts)
        if self.shape.hierarchical:
            self._note_crossing(agreed.demand, plan)
        # What was broadcast is everywhere, whoever asked for it.
        self._have |= agreed.demand.hot
        if self.choices is not None and last:
            comm.calls[comm.layer] = LastCall.read(agreed.more, self.choices)
        if plan.num_hot:
            part.hot = HotBroadcast(self.local.index_select(0, plan.hot_pairs), plan, comm, "kv")
        if len(plan.hops) == 1:
            part.rows = send_rows(self.local, plan.hops[0], comm, "kv")
        else:
            assert comm.outer is not None, "a plan with nodes comes with their groups"
            part.first = send_rows(self.local, plan.hops[0], comm.outer, "kv_outer")

    def agree(self, received: Tensor, more: Callable[[Demand], Tensor] | None) -> Agreement:
        """Read the requests of one slice; all that the host learns of a slice comes from here."""
        return agree(received, self.shape, self.layout.cp_rank, self.comm, more=more, earlier=self._earlier)

    def _hand_on(self, part: _Slice) -> None:
        """Gather broadcast blocks, and hand on in the node what came over the network."""
        plan, shape = part.plan, self.local.shape[1:]
        assert plan is not None, "rows were sent first"
        if part.hot is not None:
            buffer = self.local.new_empty(part.hot.num_elements)
            part.hot.finish(buffer)
            part.hot_rows = buffer[: plan.num_hot * self.local[0].numel()].view(-1, *shape)
            part.hot = None
        if part.first is not None:
            assert self.comm.inner is not None, "a plan with nodes comes with their groups"
            self._transit = torch.cat((self._transit, part.first.wait()))
            part.first = None
            source = OwnAndTransit(self.local, self._transit)
            part.rows = send_rows(source, plan.hops[1], self.comm.inner, "kv")

    def _add(self, demand: Demand, counts: list[int]) -> None:
        """Add a slice to the whole demand: its KV blocks are new, so counts are sums."""
        if self._sum is None:
            self._sum = _Sum(demand, counts)
            return
        total = self._sum.demand
        self._sum = _Sum(
            Demand(
                demand.shape,
                total.bits | demand.bits,
                total.counts + demand.counts,
                total.hot | demand.hot,
                total.wanted + demand.wanted,
            ),
            [a + b for a, b in zip(self._sum.counts, counts, strict=True)],
        )

    def _note_crossing(self, demand: Demand, plan: RankPlan) -> None:
        """Remember which KV blocks every node has, and where those of this rank's place stand."""
        shape, earlier = self.shape, self._earlier
        view = NodeView(demand.bits, self.layout.cp_rank, shape.node_size, shape.num_kv_blocks, earlier)
        union = node_union(demand.bits, shape)
        num_rows = self.local.shape[0] if earlier is None else earlier.num_rows
        self._earlier = Earlier(
            crossed=union if earlier is None else earlier.crossed | union,
            row=view.rows(),
            num_rows=num_rows + sum(plan.hops[0].receive),
        )

    def _loads(self, demand: Demand) -> Tensor:
        """Count what `auto` compares in the next call, of all slices together."""
        assert self.choices is not None, "called where something is to choose"
        bits = demand.bits if self._sum is None else self._sum.demand.bits | demand.bits
        hot = demand.hot if self._sum is None else self._sum.demand.hot | demand.hot
        return self.choices.loads(bits, hot)

"""The worked example of docs/context_parallelism.md, computed by the functions that training uses.

2 ranks, 4 blocks of 2 tokens, one KV head with one query head, head dim 1. Only the transport is replaced:
both ranks are in this process, so a row that is sent is a row that is indexed.
"""

import math

import torch
from msa_kernels import block_sparse_attention, select_blocks
from msa_kernels.block_sparse_attention.op import pack_blocks
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import BlockPool, PoolOutput, SparseQueries
from msa_kernels.full_attention.op import merge_parts
from torch import Tensor

from msa_train.parallel.kv_exchange.plan import (
    ExchangeShape,
    RankPlan,
    count_rows,
    find_demand,
    pack_bits,
    plan_rank,
)
from msa_train.parallel.kv_exchange.requests import kv_blocks_by_owner, needed_kv_blocks
from msa_train.parallel.sharding.shard_layout import ShardLayout

SEQ_LEN, BLOCK, RANKS, TOPK = 8, 2, 2, 2
# exp(q * k) is then a whole number, so that every share of attention is a fraction one can check by hand
WEIGHTS = [1.0, 1.0, 2.0, 1.0, 1.0, 3.0, 1.0, 2.0]
Q_INDEX = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0]
K_INDEX = [1.0, 0.0, 3.0, 1.0, -2.0, 2.0, 1.0, 0.0]


def column(values: list[float]) -> Tensor:
    """[S] -> [S, 1, 1], in fp64."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


class Example:
    """All tensors of the example, by the steps of the page; lists have an entry for each rank."""

    def __init__(self) -> None:
        self.q, self.k = column([1.0] * SEQ_LEN), column([math.log(weight) for weight in WEIGHTS])
        self.v = column([10.0 * token for token in range(SEQ_LEN)])
        self.layouts = [ShardLayout(SEQ_LEN, BLOCK, rank, RANKS) for rank in range(RANKS)]
        self.rows = [slice(rank * 4, rank * 4 + 4) for rank in range(RANKS)]
        self.selected = select_blocks(
            column(Q_INDEX),
            column(K_INDEX)[:, 0],
            torch.tensor([0, SEQ_LEN]),
            block_size=BLOCK,
            topk=TOPK,
            local_blocks=1,
        )
        self.needed = [needed_kv_blocks(self.selected[rows], SEQ_LEN // BLOCK) for rows in self.rows]
        wanted = [kv_blocks_by_owner(*pair) for pair in zip(self.needed, self.layouts, strict=True)]
        self.bits = torch.stack([pack_bits(of_rank) for of_rank in wanted])
        demand = find_demand(self.bits, ExchangeShape(RANKS, 1, SEQ_LEN // BLOCK // RANKS))
        self.plans = [plan_rank(demand, r, count_rows(demand, r).tolist()) for r in range(RANKS)]
        self.local = [pack_blocks(self.k[rows], self.v[rows], BLOCK) for rows in self.rows]
        self.fetched = [self._fetch(plan, rank) for rank, plan in enumerate(self.plans)]
        self.own_part = [self._forward(rank, self._own(rank)) for rank in range(RANKS)]
        self.fetched_part = [self._forward(rank, self._remote(rank)) for rank in range(RANKS)]
        merged = [
            merge_parts(a.out, a.lse, b.out, b.lse)
            for a, b in zip(self.own_part, self.fetched_part, strict=True)
        ]
        self.out, self.lse = [out for out, _ in merged], [lse for _, lse in merged]
        self.grad_own = [self._backward(rank, self._own(rank)) for rank in range(RANKS)]
        self.grad_fetched = [self._backward(rank, self._remote(rank)) for rank in range(RANKS)]
        self.grad = [self._add(rank) for rank in range(RANKS)]

    def _fetch(self, plan: RankPlan, rank: int) -> Tensor:
        """Rows that arrive: every owner picks what its plan says, in the order of the receiver's plan."""
        parts = [torch.empty(0, *self.local[0].shape[1:], dtype=torch.float64)]
        for owner, theirs in enumerate(self.plans):
            hop = theirs.hops[0]
            first = sum(hop.send[:rank])
            parts.append(self.local[owner][hop.take[first : first + hop.send[rank]]])
        arrived = torch.cat(parts)
        assert arrived.shape[0] == plan.num_rows
        return arrived

    def _own(self, rank: int) -> BlockPool:
        return BlockPool(kv=self.local[rank], block=torch.arange(2) + 2 * rank)

    def _remote(self, rank: int) -> BlockPool:
        plan = self.plans[rank]
        return BlockPool(kv=self.fetched[rank], block=plan.owner * 2 + plan.block_of_owner)

    def _queries(self, rank: int) -> SparseQueries:
        rows = self.rows[rank]
        return SparseQueries(q=self.q[rows, None], position=torch.arange(8)[rows], softmax_scale=1.0)

    def _entries(self, rank: int, pool: BlockPool) -> Tensor:
        """Place of every selected block in the pool, -1 for those that are not in it."""
        place = torch.full((SEQ_LEN // BLOCK + 1,), -1)
        place[pool.block + 1] = torch.arange(len(pool.block))
        return place[self.selected[self.rows[rank]].long() + 1]

    def _forward(self, rank: int, pool: BlockPool) -> PoolOutput:
        return pool_forward(self._queries(rank), pool, self._entries(rank, pool), kernel="reference")

    def _backward(self, rank: int, pool: BlockPool) -> Tensor:
        """[N, 2, B, D] gradients of the sum of all outputs with respect to the pool's keys and values."""
        out, entries = self.out[rank], self._entries(rank, pool)
        grads = pool_backward(
            self._queries(rank),
            pool,
            entries,
            torch.ones_like(out),
            out.sum(-1),
            self.lse[rank],
            None,
            kernel="reference",
        )
        return grads.dkv

    def _add(self, owner: int) -> Tensor:
        """Gradients of own blocks, and what other ranks send back for them, in rank order."""
        total = self.grad_own[owner].clone()
        for rank, plan in enumerate(self.plans):
            mine = plan.owner == owner
            total.index_add_(0, plan.block_of_owner[mine], self.grad_fetched[rank][mine])
        return total

    def one_process(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output and gradients of k and v where nothing is split."""
        k, v = self.k.clone().requires_grad_(), self.v.clone().requires_grad_()
        out, _ = block_sparse_attention(
            self.q, k, v, self.selected, block_size=BLOCK, softmax_scale=1.0, kernel="reference"
        )
        grads = torch.autograd.grad(out.sum(), (k, v))
        return out, *grads


def text() -> str:
    """What the page shows, line by line."""
    one = Example()
    ranks, both = range(RANKS), [0, 1]
    lines = [
        "token         " + _row([str(token) for token in range(SEQ_LEN)], ">8"),
        "block         " + _row([str(token // BLOCK) for token in range(SEQ_LEN)], ">8"),
        "rank          " + _row([str(token // 4) for token in range(SEQ_LEN)], ">8"),
        "index query   " + _row(Q_INDEX, "8.0f"),
        "index key     " + _row(K_INDEX, "8.0f"),
        "exp(q k)      " + _row(WEIGHTS, "8.0f"),
        "value         " + _row(one.v.flatten().tolist(), "8.0f"),
        "",
        "2. selection  " + _row([_blocks(row) for row in one.selected[:, 0].tolist()], ">8"),
        "",
        *(f"3. needed by rank {r}   [M, NB] = {_bools(one.needed[r])}" for r in ranks),
        *(f"   bitmap of rank {r}   [P, W] = {one.bits[r].tolist()}" for r in both),
        "",
        *(
            f"4. rank {r} sends       rows {one.plans[r].hops[0].take.tolist()}, to each rank "
            f"{one.plans[r].hops[0].send}; receives {one.plans[r].hops[0].receive}"
            for r in ranks
        ),
        f"   rank 1 has fetched  block {one._remote(1).block.tolist()}: "
        f"exp(k) {one.fetched[1][0, 0].exp().flatten().round(decimals=3).tolist()}, "
        f"v {one.fetched[1][0, 1].flatten().tolist()}",
        "",
        "5. own: out   " + _row(_all(part.out for part in one.own_part), "8.3f"),
        "   exp(lse)   " + _row(_all(part.lse.exp() for part in one.own_part), "8.3f"),
        "   fetched    " + _row(_all(part.out for part in one.fetched_part), "8.3f"),
        "   exp(lse)   " + _row(_all(part.lse.exp() for part in one.fetched_part), "8.3f"),
        "   merged     " + _row(_all(one.out), "8.3f"),
        "",
        "6. own: dv    " + _row(_all(grad[:, 1] for grad in one.grad_own), "8.3f"),
        "   own: dk    " + _row(_all(grad[:, 0] for grad in one.grad_own), "8.3f"),
        f"   rank 1 returns      block 1: dv {_numbers(one.grad_fetched[1][0, 1])}, "
        f"dk {_numbers(one.grad_fetched[1][0, 0])}",
        "   sum: dv    " + _row(_all(grad[:, 1] for grad in one.grad), "8.3f"),
        "   sum: dk    " + _row(_all(grad[:, 0] for grad in one.grad), "8.3f"),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _row(cells: list[float] | list[str], form: str) -> str:
    return "".join(
        f"{format(cell, form)}{' |' if token % BLOCK and token < 7 else ' '}"
        for token, cell in enumerate(cells)
    )


def _all(parts: object) -> list[float]:
    # -0.0 is printed as 0.0
    return [number + 0.0 for part in parts for number in part.flatten().tolist()]  # type: ignore[attr-defined]


def _numbers(values: Tensor) -> str:
    return " ".join(f"{number:.3f}" for number in values.flatten().tolist())


def _blocks(ids: list[int]) -> str:
    return ",".join(str(block) for block in ids if block >= 0)


def _bools(needed: Tensor) -> str:
    return str([[int(flag) for flag in row] for row in needed.tolist()])

"""Exchange plans of all ranks together: every wanted pair arrives once, by the way that was asked for."""

import math

import pytest
import torch
from torch import Tensor

from msa_train.parallel.kv_exchange import plan as exchange_plan
from msa_train.parallel.kv_exchange.plan import (
    Demand,
    ExchangeShape,
    RankPlan,
    count_rows,
    find_demand,
    find_loads,
    nonzero_of,
    pack_bits,
    plan_rank,
    unpack_bits,
)

M, NL = 3, 5


def wants(cp_size: int, density: float = 0.3) -> Tensor:
    """[P, P, NP] bool: random; the first pairs of rank 1 are wanted by all, rank 0 wants nothing else."""
    generator = torch.Generator().manual_seed(cp_size)
    wanted = torch.rand(cp_size, cp_size, M * NL, generator=generator) < density
    wanted[0] = False
    wanted[:, 1 % cp_size, :2] = True
    wanted[torch.arange(cp_size), torch.arange(cp_size)] = False
    return wanted


def plans_of(demand: Demand) -> list[RankPlan]:
    ranks = range(demand.shape.cp_size)
    return [plan_rank(demand, rank, count_rows(demand, rank).tolist()) for rank in ranks]


def travel(rows: list[Tensor], plans: list[RankPlan], hop: int, groups: list[list[int]]) -> list[Tensor]:
    """What each rank gets by an uneven all-to-all within each group; both sides must agree on sizes."""
    received: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in groups:
        sent = {r: rows[r][plans[r].hops[hop].take].split(plans[r].hops[hop].send) for r in group}
        for i, r in enumerate(group):
            parts = [sent[s][i] for s in group]
            assert [len(part) for part in parts] == plans[r].hops[hop].receive
            received[r] = torch.cat(parts)
    return received


CASES = [
    (1, 0, 0.0),
    (2, 0, 0.0),
    (5, 0, 0.0),
    (5, 0, 0.75),
    (4, 2, 0.0),
    (6, 2, 0.75),
    (6, 3, 0.0),
    (8, 4, 0.5),
]


@pytest.fixture(autouse=True)
def _broadcast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests of plans there is a broadcast wherever a pair is wanted by enough ranks."""
    if request.node.name.startswith(("test_every_wanted", "test_loads")):
        monkeypatch.setattr(exchange_plan, "HOT_COST", -math.inf)


@pytest.mark.parametrize(("cp_size", "ranks_per_node", "hot_share"), CASES)
def test_every_wanted_pair_arrives_once(cp_size: int, ranks_per_node: int, hot_share: float) -> None:
    shape = ExchangeShape(cp_size, M, NL, ranks_per_node, hot_share)
    wanted = wants(cp_size)
    demand = find_demand(pack_bits(wanted), shape)
    plans = plans_of(demand)
    # A row is its owner and pair.
    own = [torch.stack((torch.full((M * NL,), r), torch.arange(M * NL)), 1) for r in range(cp_size)]
    L, N = shape.node_size, shape.num_nodes
    nodes = [[n * L + p for p in range(L)] for n in range(N)]
    rails = [[n * L + p for n in range(N)] for p in range(L)]
    if shape.hierarchical:
        transit = travel(own, plans, 0, rails)
        # Once per node and pair, whoever wants it there.
        union = unpack_bits(demand.bits, M * NL).view(N, L, cp_size, M * NL).any(1)
        for node in range(N):
            union[node, node * L : (node + 1) * L] = False
        assert sum(map(len, transit)) == union.sum()
        source = [torch.cat(pair) for pair in zip(own, transit, strict=True)]
        fetched = travel(source, plans, 1, nodes)
    else:
        fetched = travel(own, plans, 0, [list(range(cp_size))])
    for rank, (plan, rows) in enumerate(zip(plans, fetched, strict=True)):
        pair = plan.group * NL + plan.block_of_owner
        assert torch.equal(rows, torch.stack((plan.owner, pair), 1))
        hot_pair = plan.hot_group * NL + plan.hot_block_of_owner
        got = torch.zeros(cp_size, M * NL, dtype=torch.int64)
        got.index_put_((plan.owner, pair), torch.tensor(1), accumulate=True)
        assert got.max() <= 1
        got[plan.hot_owner, hot_pair] += 1
        assert torch.equal(got.bool() & wanted[rank], wanted[rank])
        assert not (got.bool() & ~wanted[rank])[~demand.hot].any()
        assert plan.hot_pairs.tolist() == demand.hot[rank].nonzero().flatten().tolist()
        assert plan.hot_rows == demand.hot.sum(1).tolist()


@pytest.mark.parametrize(("cp_size", "ranks_per_node", "hot_share"), CASES)
def test_loads_are_those_of_the_plans(cp_size: int, ranks_per_node: int, hot_share: float) -> None:
    shape = ExchangeShape(cp_size, M, NL, ranks_per_node, hot_share)
    demand = find_demand(pack_bits(wants(cp_size)), shape)
    loads = find_loads(demand)
    L = shape.node_size
    for rank, plan in enumerate(plans_of(demand)):
        for i, hop in enumerate(plan.hops):
            me = rank if not shape.hierarchical else (rank // L if i == 0 else rank % L)
            others = [n for j, n in enumerate(hop.send) if j != me]
            assert loads.send[i][rank] == sum(others)
            assert loads.receive[i][rank] == sum(hop.receive) - hop.receive[me]
        assert loads.hot == plan.num_hot


def test_hot_pairs_are_those_that_enough_others_want() -> None:
    wanted = torch.zeros(5, 5, M * NL, dtype=torch.bool)
    wanted[1:, 0, 3] = True
    wanted[2:, 0, 4] = True
    wanted[3:, 0, 5] = True
    assert find_demand(pack_bits(wanted), ExchangeShape(5, M, NL, 0, 0.75)).hot.nonzero().tolist() == [
        [0, 3],
        [0, 4],
    ]
    assert find_demand(pack_bits(wanted), ExchangeShape(5, M, NL, 0, 1.0)).hot.nonzero().tolist() == [[0, 3]]
    assert not find_demand(pack_bits(wanted), ExchangeShape(5, M, NL)).hot.any()
    # A broadcast to two ranks is no gain.
    assert ExchangeShape(3, M, NL, 0, 0.5).hot_requesters == 3


def test_a_broadcast_must_spare_the_busiest_rank() -> None:
    """Rank 0 sends 2 pairs to 4 ranks, 8; broadcast 2 + 2 / 5. Not where a rank receives 8 anyway."""
    wanted = torch.zeros(5, 5, M * NL, dtype=torch.bool)
    wanted[1:, 0, :2] = True
    shape = ExchangeShape(5, M, NL, 0, 0.75)
    assert find_demand(pack_bits(wanted), shape).hot.sum() == 2
    wanted[4, 3, :6] = True
    demand = find_demand(pack_bits(wanted), shape)
    assert not demand.hot.any()
    assert demand.counts[4].tolist() == [2, 0, 0, 6, 0]


def test_bits_and_positions() -> None:
    mask = torch.rand(3, 21, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(unpack_bits(pack_bits(mask), 21), mask)
    assert pack_bits(torch.tensor([True, False, True, *[False] * 5, True])).tolist() == [5, 1]
    assert nonzero_of(mask, int(mask.sum())).tolist() == mask.flatten().nonzero().flatten().tolist()
    assert nonzero_of(torch.zeros(4, dtype=torch.bool), 0).numel() == 0

"""Slices of queries: how they are cut, what `auto` chooses before the scoring, what runs beside it."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from msa_train.config import ExchangeConfig, KvExchange, ParallelConfig, RunConfig
from msa_train.config.rules.exchange import check_exchange
from msa_train.parallel.comm.link_rates import ExchangeRates, Line
from msa_train.parallel.kv_exchange.cost_model import KvBlockBytes
from msa_train.parallel.kv_exchange.plan import (
    Demand,
    ExchangeShape,
    count_rows,
    find_demand,
    node_union,
    pack_bits,
    plan_rank,
)
from msa_train.parallel.kv_exchange.rows.node_hops import Earlier, NodeView
from msa_train.parallel.kv_exchange.slices import side_stream
from msa_train.parallel.kv_exchange.slices.begin import num_query_slices
from msa_train.parallel.kv_exchange.slices.last_call import Choices, LastCall
from msa_train.parallel.sharding.load_balance import balance, cut_in_slices, index_work, rank_work
from msa_train.parallel.sharding.partition import Range, SequencePartition, common, contiguous_plan, count
from msa_train.parallel.sharding.redistribute import busiest_rank


def test_slices_hold_every_query_once_with_equal_work() -> None:
    plan = SequencePartition(8, (((0, 4),), ((4, 8),)))
    first, second = cut_in_slices(plan, np.arange(1, 9), 2)
    assert (first.ranges, second.ranges) == ((((0, 3),), ((4, 6),)), (((3, 4),), ((6, 8),)))
    work, document = index_work([0, 4096, 16384], 128)
    away = balance(contiguous_plan(16384, 8), work, document)
    parts = cut_in_slices(away, work, 4)
    for rank in range(8):
        ranges = sorted(r for part in parts for r in part.ranges[rank])
        assert count(ranges) == away.num_tokens(rank)
        assert count(common(ranges, away.ranges[rank])) == away.num_tokens(rank)
    loads = np.array([rank_work(part, work) for part in parts])
    assert loads.max() < 1.1 * loads.mean()


def test_more_slices_than_queries_leave_some_empty() -> None:
    parts = cut_in_slices(contiguous_plan(64, 2), np.ones(2, dtype=np.int64), 4)
    assert [count(part.ranges[0]) for part in parts] == [0, 0, 32, 0]


@pytest.mark.parametrize(
    ("settings", "kind", "tokens", "expected"),
    [
        ({}, KvExchange.selected, 8191, 1),
        ({}, KvExchange.auto, 8192, 2),
        ({}, KvExchange.selected, 65536, 4),
        ({"overlap": False}, KvExchange.selected, 65536, 1),
        ({"query_slices": 8}, KvExchange.selected, 65536, 8),
        ({"query_slices": 8}, KvExchange.selected, 64, 2),
        ({"query_slices": 8}, KvExchange.ring, 65536, 1),
        ({}, KvExchange.all_gather, 65536, 1),
    ],
)
def test_the_rule_for_slices(settings: dict[str, Any], kind: KvExchange, tokens: int, expected: int) -> None:
    assert num_query_slices(ExchangeConfig(**settings), kind, 4, tokens, 32) == expected
    assert num_query_slices(ExchangeConfig(**settings), kind, 1, tokens, 32) == 1


def test_configured_slices_are_checked() -> None:
    good = RunConfig()
    check_exchange(replace(good, exchange=ExchangeConfig(query_slices=8)))
    with pytest.raises(ValueError, match=r"exchange\.query_slices=9: must be from 0 .* to 8; use 0"):
        check_exchange(replace(good, exchange=ExchangeConfig(query_slices=9)))
    ring = ParallelConfig(kv_exchange=KvExchange.ring)
    with pytest.raises(ValueError, match=r"exchange\.query_slices=4: is for parallel\.kv_exchange=selected"):
        check_exchange(replace(good, parallel=ring, exchange=ExchangeConfig(query_slices=4)))


def test_later_slices_cross_to_a_node_only_what_it_lacks() -> None:
    """Every rank has what it wants after its slices, and every KV block crosses to a node once."""
    P, L, NP = 6, 2, 8
    shape = ExchangeShape(P, 2, NP // 2, ranks_per_node=L)
    drawn = torch.Generator().manual_seed(1)
    wanted = torch.rand(P, P, NP, generator=drawn) < 0.5
    wanted[torch.arange(P), torch.arange(P)] = False
    slice_of = torch.randint(3, (P, P, NP), generator=drawn)
    whole = find_demand(pack_bits(wanted), shape)
    earlier: list[Earlier | None] = [None] * P
    # KV block (owner, number) of each source row: own ones, then rows in transit
    rows = [[(rank, pair) for pair in range(NP)] for rank in range(P)]
    got: list[list[tuple[int, int]]] = [[] for _ in range(P)]
    crossed = 0
    for index in range(3):
        demand = find_demand(pack_bits(wanted & (slice_of == index)), shape)
        plans = [
            plan_rank(demand, rank, count_rows(demand, rank, earlier[rank]).tolist(), earlier[rank])
            for rank in range(P)
        ]
        _check_slice(plans, demand, rows, got, L)
        crossed += sum(sum(plan.hops[0].send) for plan in plans)
        for rank in range(P):
            view = NodeView(demand.bits, rank, L, NP, earlier[rank])
            union, old = node_union(demand.bits, shape), earlier[rank]
            union = union if old is None else union | old.crossed
            earlier[rank] = Earlier(union, view.rows(), len(rows[rank]))
    for rank in range(P):
        assert sorted(got[rank]) == [tuple(pair) for pair in wanted[rank].nonzero().tolist()]
    plans = [plan_rank(whole, rank, count_rows(whole, rank).tolist()) for rank in range(P)]
    assert crossed == sum(sum(plan.hops[0].send) for plan in plans)


def _check_slice(
    plans: Sequence[Any],
    demand: Demand,
    rows: list[list[tuple[int, int]]],
    got: list[list[tuple[int, int]]],
    node_size: int,
) -> None:
    """Carry the rows of one slice from rank to rank."""
    P = demand.shape.cp_size
    for hop, mates in ((0, lambda r: range(r % node_size, P, node_size)), (1, lambda r: _node(r, node_size))):
        arriving: list[list[tuple[int, int]]] = [[] for _ in range(P)]
        for rank in range(P):
            for sender in mates(rank):
                theirs, place = plans[sender].hops[hop], list(mates(sender)).index(rank)
                first = sum(theirs.send[:place])
                taken = theirs.take[first : first + theirs.send[place]].tolist()
                arriving[rank] += [rows[sender][row] for row in taken]
            assert len(arriving[rank]) == sum(plans[rank].hops[hop].receive)
        for rank in range(P):
            if hop == 0:
                rows[rank] += arriving[rank]
                continue
            plan, local = plans[rank], demand.shape.num_local_blocks
            expected = zip(
                plan.owner.tolist(), (plan.group * local + plan.block_of_owner).tolist(), strict=True
            )
            assert arriving[rank] == list(expected)
            got[rank] += arriving[rank]


def _node(rank: int, node_size: int) -> range:
    return range(rank - rank % node_size, rank - rank % node_size + node_size)


def test_auto_chooses_by_the_call_before() -> None:
    even, size = Line(1e-4, 1e-9), KvBlockBytes(1000, 1500, 1500)
    rates = ExchangeRates(even, even, even, Line(1e-5, 1e-11), even)
    choices = Choices(ExchangeShape(4, 2, 100), ExchangeShape(4, 2, 100, ranks_per_node=2))

    def taken(*busiest: int) -> tuple[KvExchange, int]:
        call = LastCall.read([0, *busiest], choices)
        kind, shape = call.choose(choices, size, rates, ExchangeConfig())
        return kind, shape.ranks_per_node

    assert taken(50, 50, 60) == (KvExchange.selected, 0)
    assert taken(100, 50, 100) == (KvExchange.selected, 2)
    assert taken(900, 900, 900)[0] is KvExchange.all_gather


def test_loads_of_both_shapes_are_counted_together() -> None:
    choices = Choices(ExchangeShape(4, 1, 2), ExchangeShape(4, 1, 2, ranks_per_node=2))
    wanted = torch.zeros(4, 4, 2, dtype=torch.bool)
    wanted[0, 2], wanted[1, 2, 0] = True, True
    numbers = choices.loads(pack_bits(wanted), torch.zeros(4, 2, dtype=torch.bool)).tolist()
    # rank 2 sends 3 rows flat, 2 over the network; rank 0 hands 1 on to rank 1
    assert numbers == [0, 3, 2, 1]
    assert LastCall.read(numbers, choices) == LastCall(0, [[3], [2, 1]])


def test_work_beside_the_main_stream_waits_for_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            said.append(f"stream on {device}")

        def wait_event(self, event: object) -> None:
            said.append(f"waits for {event}")

        def __enter__(self) -> None:
            said.append("side")

        def __exit__(self, *error: object) -> None:
            said.append("main")

    current = SimpleNamespace(wait_stream=lambda _: said.append("joined"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(side_stream, "_streams", {})
    device = torch.device("cuda", 0)
    for event in ("first", "second"):
        with side_stream.beside(device, event):  # type: ignore[arg-type]
            said.append("work")
    side_stream.join(device)
    begin = ["stream on cuda:0", "waits for first", "side", "work", "main"]
    assert said == [*begin, "waits for second", "side", "work", "main", "joined"]
    said.clear()
    with side_stream.beside(torch.device("cpu"), side_stream.mark(torch.device("cpu"))):
        side_stream.join(torch.device("cpu"))
    assert said == []


def test_the_busiest_rank_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 3, 8):
        before: list[list[Range]] = [[(r * 16, r * 16 + 16)] for r in range(size)]
        after: list[list[Range]] = [
            [(0, int(rng.integers(1, 16))), (16, 16 + int(rng.integers(1, 8 * size)))] for _ in range(size)
        ]
        moved = np.array(
            [[count(common(a, b)) * (i != j) for j, b in enumerate(after)] for i, a in enumerate(before)]
        )
        assert busiest_rank(before, after) == max(moved.sum(0).max(), moved.sum(1).max())

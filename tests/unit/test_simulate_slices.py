"""Slices of queries that hide the exchange under scoring: what travels, when, and what it is worth."""

from dataclasses import replace

import numpy as np
import pytest

from msa_train.parallel.kv_exchange.cost_model import SELECTED_PAYS
from msa_train.simulate.costs.collective_cost import all_gather
from msa_train.simulate.costs.demand import exchange_rows, sliced_rows
from msa_train.simulate.costs.msa_layer import MsaLayer
from msa_train.simulate.costs.timeline import Mark, Timeline
from msa_train.simulate.inputs.cluster import PRESETS
from msa_train.simulate.inputs.scenario import Options, Scheme
from msa_train.simulate.layer_time import msa_layer_parts
from msa_train.simulate.reports.text import table
from msa_train.simulate.study import answer, layer_of
from tests.helpers.simulation import M3, alike, flat_cluster, rates, scenario, stated

MILLION = {"seq_len": 2**20, "cp_size": 64, "schemes": [], "index_balance": True}
# f: at least so much faster than an all-gather that starts before the scoring
GOALS = {"h100": {0.05: 1.10, 0.2: 1.05, 0.5: 1.0}, "h100_100g": {0.05: 1.6, 0.2: 1.3, 0.5: 1.05}}


@pytest.fixture(scope="module", params=[0.05, 0.2, 0.5])
def million(request: pytest.FixtureRequest) -> tuple[float, dict[int, MsaLayer]]:
    """f, and the layer of 1M tokens on 64 ranks by Ulysses degree."""
    layers = {
        size: layer_of(
            scenario(**MILLION, cluster=PRESETS["h100"], options=Options(head_size=size, query_slices=4)),
            stated(request.param),
        )
        for size in (1, 4)
    }
    return request.param, layers


@pytest.mark.parametrize("cluster", list(GOALS))
def test_a_million_tokens_reach_the_goals(cluster: str, million: tuple[float, dict[int, MsaLayer]]) -> None:
    f, layers = million
    at = {
        size: MsaLayer(replace(layer.setup, cluster=PRESETS[cluster]), layer.work)
        for size, layer in layers.items()
    }
    rival = at[1].report(Scheme.all_gather_early).total.total
    grouped = at[4].report(Scheme.selected_hierarchical)
    assert rival / grouped.total.total >= GOALS[cluster][f]
    for layer in at.values():
        assert layer.report(Scheme.auto).total.total <= rival * (1 + 1e-9)
    # two fifths of the all-gather's memory at most
    assert grouped.memory_bytes < at[1].report(Scheme.all_gather_early).memory_bytes * 0.4


@pytest.mark.parametrize("hierarchical", [False, True])
def test_slices_send_together_what_one_piece_sends(hierarchical: bool) -> None:
    layer = layer_of(scenario(cluster=PRESETS["h100"], cp_size=32, schemes=[]), stated(0.2))
    given = {"hierarchical": hierarchical, "hot_share": 0.0}
    whole = exchange_rows(layer.work.wants, PRESETS["h100"], **given)
    parts = sliced_rows(layer.work.wants, PRESETS["h100"], **given, slices=4)
    assert np.array_equal(sum(part.fetched for part in parts), whole.fetched)
    for number, hop in enumerate(whole.hops):
        assert np.array_equal(sum(part.hops[number].received for part in parts), hop.received)
        assert np.array_equal(sum(part.hops[number].sent for part in parts), hop.sent)
    assert len(parts) == 4
    assert min(part.fetched.sum() for part in parts) > 0.2 * whole.fetched.sum()


def test_more_slices_hide_more_and_all_parts_add_up() -> None:
    times = []
    for slices in (1, 2, 4, 8):
        asked = scenario(
            cluster=PRESETS["h100_100g"],
            cp_size=32,
            seq_len=2**18,
            schemes=[Scheme.selected, Scheme.selected_hierarchical],
            options=Options(query_slices=slices),
        )
        found = answer(asked, stated(0.1)).msa
        for report in found.values():
            total = report.total
            parts = total.compute + total.copying + total.imbalance + total.exposed
            assert total.total == pytest.approx(parts, rel=1e-12)
            assert sum(total.exposed_by.values()) == pytest.approx(total.exposed, abs=1e-12)
        times.append(found["selected_hierarchical"].forward.total)
    assert times == sorted(times, reverse=True)


def test_an_infinite_wire_leaves_computing_alone() -> None:
    fast = flat_cluster(node_rate_bytes=1e30, network_rate_bytes=1e30)
    asked = scenario(
        cluster=fast, rates=rates(copy_bytes=1e30, layer_overhead_s=0.0), options=Options(query_slices=4)
    )
    report = answer(asked, alike(128)).msa["selected"]
    assert report.total.exposed == pytest.approx(0, abs=1e-12)


def test_auto_asks_for_the_next_call_where_it_gathers() -> None:
    asked = scenario(
        cluster=PRESETS["h100"],
        cp_size=16,
        schemes=[Scheme.auto, Scheme.all_gather_early],
        options=Options(query_slices=4, keep_for_backward=False, hot_share=0.0),
    )
    found = answer(asked, stated(0.5)).msa
    assert found["auto"].chosen is Scheme.all_gather_early
    assert found["auto"].total.total == found["all_gather_early"].total.total
    assert "request" in found["auto"].traffic
    assert SELECTED_PAYS < 1


def test_background_transfers_take_turns_on_a_link() -> None:
    clocks = Timeline(2)
    ready = Mark(np.array([1.0, 3.0]), np.array([1.0, 3.0]))
    assert clocks.send("a", ready, 2.0, "network").busy.tolist() == [5, 5]
    later = clocks.send("b", Mark(np.zeros(2), np.zeros(2)), 2.0, "network")
    assert (later.busy.tolist(), later.free.tolist()) == ([7, 7], [0, 0])
    assert clocks.send("c", later, 1.0, "node").busy.tolist() == [8, 8]
    clocks.compute(6.0)
    clocks.wait("b", later)
    assert clocks.result().exposed == 1.0


def test_parts_of_a_layer_add_up() -> None:
    parts = msa_layer_parts(
        M3, PRESETS["h100"], rates(), seq_len=2**17, cp_size=16, f=0.9,
        options=Options(query_slices=4, recompute=True),
    )  # fmt: skip
    added = parts.projections_s + parts.scoring_s + parts.sparse_s
    added += parts.copying_s + parts.exposed_s + parts.waiting_s
    assert parts.total_s == pytest.approx(added)
    assert min(parts.projections_s, parts.scoring_s, parts.sparse_s) > 0
    assert parts.scheme is not Scheme.auto


def test_a_ring_over_nodes_takes_one_step_less_than_it_has_ranks() -> None:
    cluster = replace(PRESETS["h100"], multi_rail_collectives=False)
    wire = all_gather(1.0, 32, cluster)
    assert (wire.intra_node_steps, wire.inter_node_steps) == (27, 4)


def test_a_narrow_first_column_is_valid_markdown() -> None:
    assert table([("f", "x"), ("1", "2")]) == ["| f  |  x |", "| :- | -: |", "| 1  |  2 |"]

"""Bytes against the closed formulas; times in limits where they are known, and what must not grow."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from msa_train.simulate.costs.layer_costs import SchemeReport
from msa_train.simulate.inputs.cluster import PRESETS
from msa_train.simulate.inputs.layer_shape import BACKWARD_FACTOR
from msa_train.simulate.inputs.scenario import FullScheme, Options, Scenario, Scheme
from msa_train.simulate.study import answer, scaling
from tests.helpers.simulation import M3, alike, flat_cluster, rates, scenario, stated

FROZEN = replace(M3, trains_index=False)


def received(report: SchemeReport) -> dict[str, float]:
    """Bytes by purpose, mean over ranks."""
    return {name: sum(w.received.mean() for w in parts) for name, parts in report.traffic.items()}


@pytest.mark.parametrize("f", [0.05, 0.2, 0.4375])
def test_selected_bytes_follow_the_published_formula(f: float) -> None:
    """(256 + 6144 f) bytes for each remote token, of an all-gather 8448, whose gradients add in fp32."""
    asked = scenario(shape=FROZEN, options=Options(hot_share=0.0, keep_for_backward=False))
    found = answer(asked, stated(f)).msa
    S, P = asked.seq_len, asked.cp_size
    remote = S * (P - 1) / P
    gathered, selected = received(found["all_gather"]), received(found["selected"])
    assert sum(gathered.values()) == (256 + 2048 + 2048 + 4096) * remote
    requests = selected.pop("request")
    assert sum(selected.values()) == pytest.approx((256 + 6144 * f) * remote, rel=1e-3)
    # a bit per pair of each owner, from every rank, and a header
    assert requests == (P - 1) * (P * S / 128 / P * 4 / 8 + 64)


def test_other_schemes_follow_theirs() -> None:
    asked = scenario(shape=FROZEN)
    found = answer(asked, stated(0.2)).msa
    S, P = asked.seq_len, asked.cp_size
    remote = S * (P - 1) / P
    # the ring's gradients travel in fp32 and once around
    assert received(found["ring"]) == {
        "index_key": 256 * remote, "kv": 2048 * remote, "kv_again": 2048 * remote, "kv_grad": 2 * 2048 * S,
    }  # fmt: skip
    assert received(found["all_gather_all_reduce"]) == {
        "index_key": 256 * remote, "kv": 2048 * remote, "kv_grad": 2 * 2048 * remote,
    }  # fmt: skip
    # with the KL loss index-key gradients of every group return too
    trained = answer(replace(asked, shape=M3), stated(0.2)).msa
    assert received(trained["all_gather"])["kv_grad"] == 2 * (2048 + 4 * 256) * remote


def test_infinite_wire_exposes_nothing_and_only_compute_is_left() -> None:
    fast = flat_cluster(node_rate_bytes=1e30, network_rate_bytes=1e30)
    asked = scenario(cluster=fast, rates=rates(copy_bytes=1e30, layer_overhead_s=0.0))
    for report in answer(asked, alike(128)).msa.values():
        assert report.total.exposed == pytest.approx(0, abs=1e-12)
        assert report.total.copying == pytest.approx(0, abs=1e-12)
    # a forward pass with everything but index scoring made free: the last rank scores most
    only = rates(
        projection_flops=1e30, sparse_forward_flops=1e30, sparse_backward_flops=1e30, kl_flops=1e30,
        copy_bytes=1e30, layer_overhead_s=0.0,
    )  # fmt: skip
    T, blocks = 8192, np.arange(512)
    scores = (128 * (blocks[448:] + 1)).sum()
    expected = 2 * 128 * 4 * 128 * scores / only.index_flops
    forward = answer(replace(asked, rates=only), alike(128)).msa["selected"].forward
    assert forward.total == pytest.approx(expected, rel=1e-6)
    assert forward.compute == pytest.approx(expected * (blocks + 1).sum() * 128 / 8 / scores, rel=1e-6)
    assert asked.seq_len == T * 8


def test_slow_wire_takes_the_bytes_over_the_rate() -> None:
    slow = flat_cluster(node_rate_bytes=1e6, network_rate_bytes=1e6)
    asked = scenario(cluster=slow, options=Options(hot_share=0.0, overlap=False))
    found = answer(asked, stated(0.2)).msa
    report = found["all_gather"]
    assert report.total.exposed == pytest.approx(received_total(report) / 1e6, rel=1e-6)
    # the fullest rank decides in an uneven exchange
    selected = found["selected"]
    fullest = [max(w.sent.max(), w.received.max()) for parts in selected.traffic.values() for w in parts]
    assert selected.total.exposed == pytest.approx(sum(fullest) / 1e6, rel=1e-6)


def received_total(report: SchemeReport) -> float:
    return float(report.received.mean())


def test_parts_of_a_time_add_up_and_overlap_never_hurts() -> None:
    asked = scenario(cluster=PRESETS["h100"], cp_size=16)
    with_overlap, without = (
        answer(replace(asked, options=Options(overlap=on, hot_share=0.75)), alike(256)).msa
        for on in (True, False)
    )
    for name, report in with_overlap.items():
        total = report.total
        parts = total.compute + total.copying + total.imbalance + total.exposed
        assert total.total == pytest.approx(parts, rel=1e-12)
        assert sum(total.exposed_by.values()) == pytest.approx(total.exposed, abs=1e-12)
        assert min(total.compute, total.copying, total.exposed) >= 0
        assert total.total <= without[name].total.total * (1 + 1e-12)


@pytest.mark.parametrize(
    "scheme", [Scheme.ring, Scheme.all_gather, Scheme.selected, Scheme.selected_hierarchical]
)
def test_a_faster_network_is_never_slower(scheme: Scheme) -> None:
    h100 = PRESETS["h100"]
    times = [
        answer(
            scenario(cluster=replace(h100, network_rate_bytes=rate), cp_size=16, schemes=[scheme]), alike(256)
        ).msa[scheme.value].total.total
        for rate in (1e9, 5e9, 25e9, 100e9)
    ]  # fmt: skip
    assert all(slow > fast for slow, fast in pairwise(times[:3]))
    assert times[2] >= times[3]


def test_more_selected_is_more_to_send_and_never_faster() -> None:
    reports = [
        answer(scenario(schemes=[Scheme.selected]), stated(f)).msa["selected"] for f in (0.05, 0.2, 0.4)
    ]
    assert [r.received.mean() for r in reports] == sorted(r.received.mean() for r in reports)
    assert [r.memory_bytes for r in reports] == sorted(r.memory_bytes for r in reports)
    assert [r.total.total for r in reports] == sorted(r.total.total for r in reports)


def test_nodes_save_the_network_what_neighbours_share() -> None:
    found = answer(scenario(cluster=PRESETS["h100"], cp_size=16), stated(0.3)).msa
    flat, by_node = found["selected"], found["selected_hierarchical"]
    assert by_node.far.sum() < 0.5 * flat.far.sum()
    # within a node there is nothing to save
    one = answer(scenario(cluster=PRESETS["h100"], cp_size=8), stated(0.3)).msa
    assert np.array_equal(one["selected"].received, one["selected_hierarchical"].received)
    assert one["selected"].far.sum() == 0


def test_auto_takes_what_pays() -> None:
    asked = scenario(cluster=PRESETS["h100"], cp_size=16, schemes=[Scheme.auto, Scheme.all_gather])
    assert answer(asked, stated(0.03)).msa["auto"].chosen is Scheme.selected_hierarchical
    # fetched twice
    asked = replace(asked, options=Options(keep_for_backward=False, hot_share=0.0))
    everything = answer(asked, stated(0.5)).msa
    assert everything["auto"].chosen is Scheme.all_gather
    # and pays for having asked
    assert everything["auto"].total.total > everything["all_gather"].total.total
    assert "request" in everything["auto"].traffic


def test_one_rank_sends_nothing() -> None:
    asked = scenario(cp_size=1, seq_len=8192, schemes=[Scheme.ring, Scheme.all_gather, Scheme.selected])
    for report in answer(asked, alike(128)).msa.values():
        assert report.received.sum() == 0
        assert report.total.exposed == 0


def test_head_parallel_ranks_divide_the_outer_traffic() -> None:
    asked = scenario(schemes=[Scheme.all_gather, Scheme.selected], cluster=PRESETS["h100"], cp_size=16)
    flat = answer(asked, alike(128)).msa["all_gather"]
    inner = answer(replace(asked, options=Options(head_size=4, hot_share=0.0)), alike(128))
    grouped = inner.msa["all_gather"]
    tokens = 65536 // 16
    # 4 ranks of the same place instead of 16, with 4 times the tokens and a quarter of the groups
    assert received(grouped)["kv"] == pytest.approx(received(flat)["kv"] * (3 / 4) / (15 / 16) / 4)
    assert received(grouped)["index_key"] == received(flat)["index_key"]
    # in: 64 + 2 * 4 heads of 128 and 4 index queries; out: 64 heads; both in both passes, 3 of 4 parts leave
    assert received(grouped)["heads"] == 2 * tokens * 3 / 4 * 2 * (72 * 128 + 4 * 128 + 64 * 128)
    assert grouped.received.shape == (16,)
    assert inner.f == pytest.approx(answer(scenario(cp_size=4), alike(128)).f)


def test_recompute_runs_the_forward_twice_without_scoring() -> None:
    asked = scenario(schemes=[Scheme.selected])
    once = answer(asked, alike(128)).msa["selected"]
    twice = answer(replace(asked, options=Options(hot_share=0.0, recompute=True)), alike(128)).msa["selected"]
    assert received(twice)["kv"] == 2 * received(once)["kv"]
    assert received(twice)["request"] == received(once)["request"]
    assert once.backward.total < twice.backward.total < once.backward.total + once.forward.total


def test_index_balance_evens_the_scoring_out_and_moves_what_it_says() -> None:
    asked = scenario(cluster=PRESETS["h100"])
    alone, shared = (answer(replace(asked, index_balance=on), alike(128)) for on in (False, True))
    assert alone.index_balance > 1.8
    assert shared.index_balance <= 1.05
    assert shared.msa["selected"].forward.total < alone.msa["selected"].forward.total
    there, back = shared.msa["selected"].traffic["index_query"]
    # a query is 4 heads of 128 in bf16, its answer 4 x 16 block ids
    assert there.received.sum() / back.received.sum() == (4 * 128 * 2) / (4 * 16 * 4)
    assert there.received.sum() > 0
    assert "index_query" not in alone.msa["selected"].traffic


def test_full_attention_layers() -> None:
    asked = scenario(cluster=PRESETS["h100"], schemes=[], full_schemes=list(FullScheme))
    found = answer(asked, alike(128)).full
    S, P, T = 65536, 8, 8192
    remote = S * (P - 1) / P
    assert received(found["all_gather"])["full_kv"] == 2048 * remote
    assert received(found["ring_unbalanced"])["full_kv"] == 2048 * remote
    # the work is that of a causal triangle, however it is shared
    flops = (1 + BACKWARD_FACTOR * rates().full_forward_flops / rates().full_backward_flops) * 4 * 128 * 64
    attention = flops * S * (S + 1) / 2 / P / rates().full_forward_flops
    assert found["ring"].total.compute == pytest.approx(
        attention + 3 * 2 * T * 6144 * (72 + 64) * 128 / rates().projection_flops + rates().layer_overhead_s
    )
    # zigzag: no rank computes more than another; as it is, the last one computes (2 P - 1) / P of the mean
    assert found["ring"].total.imbalance < 0.01 * attention
    assert found["ring_unbalanced"].total.imbalance == pytest.approx(7 / 8 * attention, rel=0.01)
    assert found["selected"].received.sum() < found["all_gather"].received.sum()


@pytest.mark.parametrize("weak", [True, False])
def test_scaling_starts_at_8_ranks(weak: bool) -> None:
    asked = scenario(cluster=PRESETS["h100"], cp_size=8, schemes=[Scheme.ring, Scheme.selected])

    def selections(at: Scenario) -> object:
        assert (at.seq_len // at.cp_size == 8192) if weak else (at.seq_len == 65536)
        return alike(128)

    points = scaling(asked, selections, [16, 32], weak=weak)  # type: ignore[arg-type]
    assert [p.cp_size for p in points] == [8, 16, 32]
    assert points[0].kept == {"ring": 1.0, "selected": 1.0}
    assert points[2].kept["selected"] > points[2].kept["ring"]
    for point in points:
        assert all(0 < e <= 1 for e in point.efficiency.values())
        assert point.kept["ring"] == point.efficiency["ring"] / points[0].efficiency["ring"]

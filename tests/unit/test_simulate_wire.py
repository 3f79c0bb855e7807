"""Collectives: bytes by link, times, and hot pairs as training cuts them."""

from dataclasses import replace

import numpy as np
import pytest

from msa_train.parallel.kv_exchange.hot_blocks import HotSlices
from msa_train.simulate.costs import collective_cost
from msa_train.simulate.costs.hot_blocks import hot_wires, spans
from msa_train.simulate.costs.timeline import Among, Timeline
from msa_train.simulate.inputs.cluster import PRESETS
from tests.helpers.simulation import M3, flat_cluster

NODES = flat_cluster(gpus_per_node=4, node_rate_bytes=1e10)


def test_gather_crosses_the_network_once_per_node_on_rails() -> None:
    rails = collective_cost.all_gather(100.0, 8, NODES)
    assert rails.received.tolist() == [700.0] * 8
    # 4 remote shards, spread over 4 network cards
    assert rails.inter_node_received.tolist() == [100.0] * 8
    ring = collective_cost.all_gather(100.0, 8, replace(NODES, multi_rail_collectives=False))
    assert ring.received.tolist() == [700.0] * 8
    assert ring.inter_node_received.tolist() == [700.0, 0, 0, 0, 700.0, 0, 0, 0]
    assert ring.inter_node_sent.tolist() == [0, 0, 0, 700.0, 0, 0, 0, 700.0]
    assert rails.time_s(NODES) < ring.time_s(NODES)


def test_reductions_are_gathers_backwards() -> None:
    scatter = collective_cost.reduce_scatter(100.0, 8, NODES)
    assert np.array_equal(scatter.sent, collective_cost.all_gather(100.0, 8, NODES).received)
    assert np.array_equal(collective_cost.all_reduce(100.0, 8, NODES).received, 2 * scatter.received)


def test_all_to_all_by_hand() -> None:
    rows = np.array([[9, 1, 2], [0, 9, 4], [5, 0, 9]])
    moved = collective_cost.all_to_all(rows, 10.0, flat_cluster(gpus_per_node=2))
    assert moved.intra_node_received.tolist() == [10, 0, 0]
    assert moved.inter_node_received.tolist() == [20, 40, 50]
    assert moved.sent.tolist() == [50, 10, 60]
    assert moved.time_s(flat_cluster(gpus_per_node=2, network_rate_bytes=2.0)) == 30.0


def test_limits_of_a_link() -> None:
    moved = collective_cost.all_gather(1e6, 8, replace(NODES, multi_rail_collectives=False))
    alone = moved.time_s(NODES)
    assert moved.time_s(replace(NODES, link_efficiency=0.5)) == pytest.approx(2 * alone)
    # each node's uplink carries 7 shards in a ring
    assert moved.time_s(replace(NODES, node_uplink_bytes=1e8)) == pytest.approx(7e6 / 1e8)
    assert moved.time_s(replace(NODES, host_s_per_byte=1.0, compute_share=0.5)) == pytest.approx(2 * 7e6)
    one_link = replace(NODES, node_rate_bytes=1e9, one_link=True)
    rails = collective_cost.all_gather(1e6, 8, one_link)
    assert rails.time_s(one_link) == pytest.approx(7e6 / 1e9)
    late = replace(NODES, node_latency_s=1.0, network_latency_s=100.0)
    assert rails.time_s(late) == pytest.approx(3 * 1.0 + 1 * 100.0, rel=1e-3)
    shifted = collective_cost.shift(1e6, 8, NODES)
    assert shifted.inter_node_sent.tolist() == [0, 0, 0, 1e6, 0, 0, 0, 1e6]


@pytest.mark.parametrize("node_size", [2, 3, 6])
def test_hot_slices_are_those_of_training(node_size: int) -> None:
    hot, elements = np.array([3, 0, 2, 1, 0, 5]), 7
    found, slice_size = spans(hot, elements, node_size)
    ends = [0, *(hot.cumsum() * elements).tolist()]
    slices = HotSlices(ends, slice_size, node_size, 6 // node_size)
    for rank in range(6):
        for owner in range(6):
            start, stop = slices.span(owner, rank)
            assert found[rank, owner] == stop - start
    assert found.sum() == 11 * elements


def test_hot_pairs_cost_about_one_gather_of_them() -> None:
    hot = np.full((1, 16), 4)
    h100 = PRESETS["h100"]
    for node_size in (8, 16):
        plan = hot_wires(hot, M3, h100, node_size)
        received = sum(wire.received for wire in plan.forward)
        assert received == pytest.approx(np.full(16, (64 - 4) * M3.kv_block_bytes), rel=0.07)
        assert sum(plan.seconds(plan.forward, h100)) == sum(wire.time_s(h100) for wire in plan.forward)
    assert hot_wires(np.zeros((1, 16), dtype=int), M3, h100, 16).forward == []


def test_clocks_by_hand() -> None:
    clocks = Timeline(4, node_size=2)
    clocks.compute(np.array([1.0, 2.0, 3.0, 4.0]))
    clocks.collective("a", 10.0, Among.node)
    assert clocks.busy.tolist() == [12, 12, 14, 14]
    assert clocks.free.tolist() == [2, 2, 4, 4]
    started = clocks.start()
    clocks.compute(6.0)
    clocks.finish("b", started, 5.0, Among.place)
    # ranks 0 and 2: started at 14, done at 19; their computing took until 18 and 20
    assert clocks.busy.tolist() == [19, 19, 20, 20]
    clocks.finish("b", clocks.start(), 1.0)
    clocks.neighbours("ring", np.array([0.0, 0.0, 0.0, 3.0]), 2.0)
    assert clocks.busy.tolist() == [23, 23, 23, 24]
    result = clocks.result()
    assert result.compute == (1 + 2 + 3 + 4 + 24 + 3) / 4
    assert result.wire == {"a": 10.0, "b": 6.0, "ring": 2.0}
    assert result.total == result.compute + result.copying + result.imbalance + result.exposed
    assert sum(result.exposed_by.values()) == result.exposed


def test_clusters_check_their_figures() -> None:
    for cluster in PRESETS.values():
        assert "assumption" in cluster.source
    with pytest.raises(ValueError, match=r"link_efficiency=1.2: must be above 0 and at most 1"):
        replace(NODES, link_efficiency=1.2)
    with pytest.raises(ValueError, match="gpus_per_node=0: must be positive"):
        replace(NODES, gpus_per_node=0)
    with pytest.raises(ValueError, match="cp_size=6: must be at most gpus_per_node=4 or a multiple of it"):
        NODES.num_nodes(6)

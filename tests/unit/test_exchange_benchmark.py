"""The exchange benchmark's formulas, selections and counters, against numbers done by hand."""

import pytest
import torch

from benchmarks.exchange.counters import Counters, parse_counters
from benchmarks.exchange.demand import Wants
from benchmarks.exchange.formulas import (
    LayerShape,
    all_gather_bytes,
    all_reduce_bytes,
    ring_bytes,
    selected_bytes,
)
from benchmarks.exchange.layer import worst_row_error
from benchmarks.exchange.measure import make_part
from benchmarks.exchange.namespaces import Rates
from benchmarks.exchange.report import goals
from benchmarks.exchange.selections import TRAINED, construct, remote_kv_blocks, select, shape_for
from msa_train.parallel.kv_exchange.plan import ExchangeShape, find_demand, pack_bits
from msa_train.parallel.sharding.shard_layout import ShardLayout

M3 = LayerShape(seq_len=131_072, block_size=128, bytes_per_element=2, with_kl=False)
DEV = """Inter-|   Receive                 |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier
    lo:       5       1    0    0    0     0          0         0        5       1    0    0    0     0   0 0
  eth0: 1000900      30    2    0    0     0          0         0   200070      11    0    0    0     0   0 0
"""


def test_all_gather_bytes_of_m3() -> None:
    # 131,072 tokens on 8 ranks: 7/8 of 256 + 2048 bytes per token forward, and of 4096 backward.
    found = all_gather_bytes(M3, 8)
    tokens = 131_072 * 7 // 8
    assert found == {
        "index_key": tokens * 256,
        "kv": tokens * 2048,
        "kv_again": tokens * 2048,
        "kv_grad": tokens * 2048,
    }
    assert sum(all_reduce_bytes(M3, 8).values()) == sum(found.values())
    assert ring_bytes(M3, 8)["kv_grad"] == 131_072 * 2048


@pytest.mark.parametrize("f", [0.0625, 0.25, 1.0])
def test_selected_bytes_fall_with_f(f: float) -> None:
    pairs = int(f * 4 * 1024 * 7 // 8)
    found = selected_bytes(M3, 8, fetched=pairs, served=pairs)
    gathered = all_gather_bytes(M3, 8)
    assert found["kv"] == f * gathered["kv"]
    assert found["kv_grad"] == f * gathered["kv_grad"]
    assert found["index_key"] == gathered["index_key"]
    forward, backward = 256 + 2048 * f, 2048 * f
    ratio = sum(gathered.values()) / (sum(found.values()) - found["request"])
    assert ratio == pytest.approx((2304 + 4096) / (forward + backward))


def test_index_gradients_come_once_per_group() -> None:
    shape = LayerShape(seq_len=64, block_size=8, num_kv_heads=2, head_dim=4, index_head_dim=4)
    # fp32: K/V of a token 64 bytes, its index key 16; 32 remote tokens.
    assert all_gather_bytes(shape, 2)["kv_grad"] == 32 * (64 + 2 * 16)
    # A pair is 8 tokens of one group.
    assert selected_bytes(shape, 2, fetched=3, served=5) == {
        "index_key": 32 * 16,
        # A byte holds the bits of 8 pairs; two owners and a header.
        "request": 66,
        "kv": 3 * 8 * 32,
        "kv_grad": 5 * 8 * (32 + 16),
    }


@pytest.mark.parametrize("cp_size", [2, 4, 8])
@pytest.mark.parametrize("f", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_constructed_selections_have_the_wanted_f(f: float, cp_size: int) -> None:
    shape = LayerShape()
    for rank in range(cp_size):
        layout = ShardLayout(4096, 32, rank, cp_size)
        blocks = construct(f, shape, layout)
        assert blocks.shape == (4096 // cp_size, 4, 4)
        remote = 4 * (layout.num_blocks - layout.num_local_blocks)
        pairs = remote_kv_blocks(blocks, layout)
        assert int(pairs.sum()) == round(f * remote)
        by_group = pairs.sum((0, 2))
        assert int(by_group.max() - by_group.min()) <= 1
        assert not bool(pairs[rank].any())
        own = torch.arange(*layout.ranges[0]) // 32
        assert bool((blocks == own[:, None, None]).any(2).all())
        _check_rows(blocks, layout)


def test_constructed_selections_need_enough_queries() -> None:
    with pytest.raises(ValueError, match=r"f=1\.0: 15 blocks of a group do not fit in 4 queries"):
        construct(1.0, LayerShape(seq_len=64, block_size=4, topk=3), ShardLayout(64, 4, 0, 16))


@pytest.mark.parametrize("cp_size", [4, 8])
def test_the_trained_selection_is_causal(cp_size: int) -> None:
    shape = shape_for(TRAINED, LayerShape())
    assert (shape.seq_len, shape.block_size, shape.topk) == (4096, 8, 4)
    fetched: list[int] = []
    for rank in range(cp_size):
        layout = ShardLayout(4096, 8, rank, cp_size)
        blocks = select(TRAINED, shape, layout)
        own = torch.arange(*layout.ranges[0]) // 8
        assert bool((blocks <= own[:, None, None]).all())
        assert bool((blocks == own[:, None, None]).any(2).all())
        _check_rows(blocks, layout)
        fetched.append(int(remote_kv_blocks(blocks, layout).sum()))
    assert fetched[0] == 0
    assert fetched == sorted(fetched)


def _check_rows(blocks: torch.Tensor, layout: ShardLayout) -> None:
    """Ids of the pack, none twice in a row."""
    assert int(blocks.max()) < layout.num_blocks
    assert int(blocks.min()) >= -1
    ordered = blocks.sort(-1).values
    assert not bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any())


@pytest.mark.parametrize(
    ("popular", "ranks_per_node", "broadcast"),
    # To the one other node a pair goes once anyway.
    [(0.9, 0, True), (0.9, 2, True), (0.9, 4, False), (0.1, 0, False), (0.1, 2, False)],
)
def test_hot_pairs_are_those_of_the_planner(popular: float, ranks_per_node: int, broadcast: bool) -> None:
    # Nearly all ranks want what rank 0 owns, or nothing much.
    generator = torch.Generator().manual_seed(0)
    share = torch.full((8, 8, 40), 0.3)
    share[:, 0] = popular
    wanted = torch.rand(share.shape, generator=generator) < share
    wanted[range(8), range(8)] = False
    wants = Wants(wanted, ranks_per_node, hot_share=0.75)
    shape = ExchangeShape(8, 4, 10, ranks_per_node, 0.75)
    assert wants.hot.equal(find_demand(pack_bits(wanted), shape).hot)
    assert wants.hot.any() == broadcast


def test_counters_of_an_interface() -> None:
    found = parse_counters(DEV, "eth0")
    assert found == Counters(1_000_900, 30, 200_070, 11)
    assert found - Counters(900, 10, 70, 1) == Counters(1_000_000, 20, 200_000, 10)
    with pytest.raises(ValueError, match="interface=eth1"):
        parse_counters(DEV, "eth1")


def test_the_worst_row_counts() -> None:
    wanted = {"a": torch.ones(100, 4), "b": torch.zeros(3, 4)}
    found = {"a": torch.ones(100, 4), "b": torch.zeros(3, 4)}
    assert worst_row_error(found, wanted) == 0
    found["a"][7, 0] += 0.02
    assert worst_row_error(found, wanted) == pytest.approx(0.01)
    found["b"][1, 1] = 1e-30
    assert worst_row_error(found, wanted) == float("inf")
    found["b"][1, 1] = float("nan")
    assert worst_row_error(found, wanted) == float("inf")


def test_parts_by_name() -> None:
    assert make_part("8", [200, 1000], [1000, 400]).rates == (Rates(200), Rates(1000))
    nodes = make_part("2x4", [200], [1000, 400])
    assert (nodes.ranks, nodes.nodes, nodes.rates) == (8, 2, (Rates(1000, 400),))
    for name in ("0", "x4", "3x4", "four"):
        with pytest.raises(ValueError, match=f"--parts {name}: must be"):
            make_part(name, [200], [1000, 400])


def test_goals_are_judged_by_the_worst_row() -> None:
    def row(scheme: str, f: float, seconds: float, received: int, formula: int) -> dict[str, object]:
        return {
            "part": "8", "rate_mbit": 200, "node_rate_mbit": 0, "selection": str(f), "f": f, "scheme": scheme,
            "step_s_median": seconds, "interface_received_bytes": [received], "formula_bytes": [formula],
        }  # fmt: skip

    rows = [
        row("all_gather", 0.05, 4.0, 1010, 1000), row("selected", 0.05, 1.0, 103, 100),
        row("all_gather", 0.2, 4.0, 1000, 1000), row("selected", 0.2, 1.6, 180, 200),
    ]  # fmt: skip
    text = "\n".join(goals({"rows": rows, "shaped": True}))
    assert "0.900 (selected, f 0.200" in text
    assert "at most 0.200 of the all-gather's bytes" in text
    assert "at least 2.5 times as fast" in text

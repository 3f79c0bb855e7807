"""Prices of layers, the cut that they lead to, and what is said of `parallel.pp_layout`."""

import itertools
import math
import random

import pytest

from launchers.hydra_config.compose import compose_run
from msa_train.config import RunConfig, StageConfig, check_rules
from msa_train.config.pipeline import (
    LayerRates,
    best_layout,
    describe_layout,
    even_layout,
    layer_bytes,
    layer_prices,
    price_layers,
    rank_sums,
    resolve_layout,
)
from msa_train.simulate.inputs.rates import load_rates

M3 = {
    "1m": (["run=m3_1m", "parallel.pp_size=4", "parallel.cp_size=64", "parallel.ep_size=64"], 256),
    "200k": (["run=m3_200k", "parallel.pp_size=4", "parallel.cp_size=16", "parallel.ep_size=32"], 128),
}


def m3(name: str, pp_layout: str) -> tuple[RunConfig, int]:
    settings, world_size = M3[name]
    return compose_run([*settings, f"parallel.pp_layout={pp_layout}"]), world_size


def ratio(prices: list[float], sizes: tuple[int, ...], pp_size: int) -> float:
    sums = rank_sums(prices, sizes, pp_size)
    return max(sums) * pp_size / sum(sums)


def test_forward_flops_of_m3_at_1m() -> None:
    """Per token: by hand from the sizes of the model."""
    config, _ = m3("1m", "even")
    prices = price_layers(config, rates=LayerRates.flops_only(), backward=False)
    projections = 2 * 6144 * (2 * 64 + 2 * 4) * 128
    attention = 4 * 64 * 128 * (2**20 + 1) / 2
    assert prices.layers[2] == pytest.approx(projections + attention + 6 * 6144 * 12288)
    index = 2 * 6144 * 5 * 128 + 2 * 128 * 4 * 2**20 / 2
    experts = 2 * 6144 * 128 + 6 * 6144 * 5 * 3072
    sparse = 4 * 64 * 128 * 2048
    assert prices.layers[3] == pytest.approx(projections + index + experts + sparse, rel=1e-3)
    assert prices.head == 2 * 200064 * 6144
    # what a pipeline of equal numbers of layers costs: 70, 21, 21 and 23 GFLOP
    sums = rank_sums(prices.by_layer(), even_layout(60, 4), 4)
    assert [round(one / 1e9) for one in sums] == [70, 21, 21, 23]


def test_selective_recomputation_prices_what_it_names() -> None:
    def layer(*settings: str) -> float:
        return price_layers(compose_run([*M3["1m"][0], *settings]), rates=LayerRates.flops_only()).layers[10]

    none, full = layer("train.recompute=none"), layer("train.recompute=full")
    selective = [
        layer("train.recompute=selective", f"train.recompute_modules='{modules}'") - none
        for modules in ("norm", "experts", "attention", "attention,experts")
    ]
    experts, sparse = 2 * 6144 * 128 + 6 * 6144 * 5 * 3072, 4 * 64 * 128 * 2048
    assert selective[0] == 0
    assert selective[1] == pytest.approx(experts)
    assert selective[2] == pytest.approx(sparse, rel=1e-3)
    assert selective[3] == pytest.approx(experts + sparse, rel=1e-3)
    assert full - none > selective[3]


@pytest.mark.parametrize(("name", "even", "auto"), [("1m", 1.91, 1.09), ("200k", 1.19, 1.04)])
def test_auto_balances_m3(name: str, even: float, auto: float) -> None:
    """The figures of docs/pipeline.md; at most 1.1, with bytes within 1.15 of the mean."""
    config, world_size = m3(name, "auto")
    prices, sizes = layer_prices(config), resolve_layout(config, world_size).sizes
    assert ratio(prices, even_layout(60, 4), 4) == pytest.approx(even, abs=0.006)
    assert ratio(prices, sizes, 4) == pytest.approx(auto, abs=0.006)
    assert ratio(prices, sizes, 4) <= 1.1
    assert ratio(layer_bytes(config, world_size), sizes, 4) <= 1.15
    assert sum(sizes) == 60


@pytest.mark.parametrize("name", M3)
def test_forward_flops_can_be_balanced_contiguously(name: str) -> None:
    prices = price_layers(m3(name, "even")[0], rates=LayerRates.flops_only(), backward=False).by_layer()
    sizes = best_layout(prices, 4)
    assert sizes is not None
    assert ratio(prices, sizes, 4) <= 1.06


def test_auto_stays_contiguous_without_enough_packs() -> None:
    config, world_size = m3("1m", "auto")
    config.train.global_batch_size = 6
    assert resolve_layout(config, world_size).num_chunks == 1
    # nor where one stage of the run, or its shorter steps, have too few
    config.train.global_batch_size = 8
    config.stages = {"first": StageConfig(tokens=2**30, global_batch_size=6), "second": StageConfig()}
    assert resolve_layout(config, world_size).num_chunks == 1


def test_mtp_costs_as_much_as_its_layer_and_output() -> None:
    config, _ = m3("200k", "even")
    without, with_two = price_layers(config), price_layers(config, num_mtp_layers=2)
    assert with_two.mtp > 2 * (without.layers[-1] + without.head)
    assert with_two.by_layer()[-1] == pytest.approx(without.by_layer()[-1] + with_two.mtp)


def test_rates_are_those_of_the_simulator() -> None:
    ours, theirs = LayerRates(), load_rates("h100_assumed")
    assert (ours.gemm, ours.full_forward, ours.full_backward, ours.scoring) == (
        theirs.projection_flops,
        theirs.full_forward_flops,
        theirs.full_backward_flops,
        theirs.index_flops,
    )
    assert (ours.sparse_forward, ours.sparse_backward, ours.kl) == (
        theirs.sparse_forward_flops,
        theirs.sparse_backward_flops,
        theirs.kl_flops,
    )


def all_cuts(num_layers: int, parts: int) -> list[tuple[int, ...]]:
    edges = itertools.combinations(range(1, num_layers), parts - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *some, num_layers))) for some in edges]


@pytest.mark.parametrize("seed", range(20))
def test_contiguous_cut_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    prices = [rng.choice([1.0, 2.0, 9.0, rng.random()]) for _ in range(9)]
    sizes = [rng.random() for _ in prices]
    most = 0.5 * sum(sizes)
    fitting = [cut for cut in all_cuts(9, 3) if max(rank_sums(sizes, cut, 3)) <= most]
    found = best_layout(prices, 3, layer_bytes=sizes, max_bytes=most)
    if not fitting:
        assert found is None
        return
    assert found in fitting
    best = min(max(rank_sums(prices, cut, 3)) for cut in fitting)
    assert max(rank_sums(prices, found, 3)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_interleaved_cut_is_near_the_best_of_all(seed: int) -> None:
    """A search, and not exact: within a tenth of the best of all cuts."""
    rng = random.Random(seed)
    prices = [rng.choice([1.0, 1.0, 1.0, 4.0]) for _ in range(12)]
    found = best_layout(prices, 2, 2)
    assert found is not None
    best = min(max(rank_sums(prices, cut, 2)) for cut in all_cuts(12, 4))
    assert max(rank_sums(prices, found, 2)) <= 1.1 * best


def test_no_cut_where_nothing_fits() -> None:
    assert best_layout([1.0] * 4, 2, layer_bytes=[1.0] * 4, max_bytes=1.5) is None
    assert best_layout([1.0] * 3, 2, 2) is None
    assert best_layout([math.pi] * 4, 2, 2) == (1, 1, 1, 1)


def test_layers_of_chunks() -> None:
    config, world_size = m3("1m", "1,1,1,9,12,12,12,12")
    layout = resolve_layout(config, world_size)
    assert (layout.num_chunks, layout.is_even, str(layout)) == (2, False, "1,1,1,9,12,12,12,12")
    assert layout.layers(3, 0) == range(3, 12)
    assert layout.layers(0, 1) == range(12, 24)
    lines = describe_layout(config, world_size)
    assert "parallel.pp_layout=1,1,1,9,12,12,12,12, 2 chunks per rank; slowest rank " in lines[0]
    assert lines[4].startswith("  rank 3: layers 4 to 12 and 49 to 60, ")
    assert describe_layout(compose_run(["run=demo"]), 2) == []


@pytest.mark.parametrize(
    ("pp_layout", "message"),
    [
        ("fair", "parallel.pp_layout=fair: must be even, auto, or layers per stage"),
        ("", "parallel.pp_layout=: must be even, auto, or layers per stage"),
        ("15,15,15", "must have a number for each of the parallel.pp_size=4 ranks"),
        ("15,15,15,15.5", "must be even, auto, or layers per stage"),
        ("20,20,20,0", "every chunk must have a layer"),
        ("-1,21,20,20", "must be even, auto, or layers per stage"),
        ("15,15,15,16", "must add up to model.num_layers=60, and is 61; correct it"),
        ("9" * 400, "must be even, auto, or layers per stage"),
    ],
)
def test_bad_layouts_are_one_line(pp_layout: str, message: str) -> None:
    config, world_size = m3("1m", pp_layout)
    with pytest.raises(ValueError) as error:
        check_rules(config, world_size=world_size, has_gpu=True)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit_the_layers() -> None:
    sizes = ["parallel.pp_size=7", "parallel.cp_size=1", "parallel.cp_head_size=1", "parallel.ep_size=1"]
    even = compose_run(["run=m3_1m", *sizes, "parallel.pp_layout=even"])
    with pytest.raises(ValueError, match=r"pp_size=7: must divide model.num_layers=60 .*pp_layout=auto"):
        check_rules(even, world_size=7, has_gpu=True)
    one = compose_run(["run=demo", "parallel.pp_layout=1,2"])
    with pytest.raises(ValueError, match=r"use parallel\.pp_layout=even"):
        check_rules(one, world_size=2, has_gpu=False)


def test_interleaving_needs_multiples_of_the_stages() -> None:
    config, world_size = m3("1m", "1,1,1,9,12,12,12,12")
    check_rules(config, world_size=world_size, has_gpu=True)
    config.train.global_batch_size = 6
    with pytest.raises(ValueError, match=r"an interleaved .* use train.global_batch_size=8"):
        check_rules(config, world_size=world_size, has_gpu=True)

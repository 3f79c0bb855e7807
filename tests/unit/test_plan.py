"""The planner's arithmetic: parameters, FLOPs, what is in flight, memory of states, seconds of a step."""

from dataclasses import replace

import pytest

from launchers.hydra_config.compose import compose_run
from msa_train.config import Recompute, RunConfig
from msa_train.config.model_size import model_size
from msa_train.config.pipeline import PipelineLayout, resolve_layout
from msa_train.plan.assumptions import GIB, Assumptions
from msa_train.plan.flop_count import flops_per_token
from msa_train.plan.layer_time import LayerTimes, Machine, dispatch_seconds
from msa_train.plan.memory import own_parameters, rank_memory
from msa_train.plan.stage_parameters import stage_parameters
from msa_train.plan.stages import in_flight, stages_of, stages_of_run
from msa_train.plan.step_time import step_time
from msa_train.simulate.inputs.cluster import PRESETS
from msa_train.simulate.inputs.rates import load_rates


def with_parallel(config: RunConfig, **sizes: object) -> RunConfig:
    return replace(config, parallel=replace(config.parallel, **sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["m3", "m2", "msa_109b", "tiny"])
def test_stages_hold_all_parameters(model: str) -> None:
    config = with_parallel(compose_run(["run=pretrain", f"model={model}"]), pp_size=1, ep_size=1)
    size = model_size(config.model, config.attention)
    one = stage_parameters(
        config.model, config.attention, config.parallel, stages_of_run(config, 1).layers, 0
    )
    biases = (config.model.num_layers - config.model.num_dense_ffn_layers) * config.model.num_experts
    # biases of the experts are buffers
    assert one.dense + one.experts == size.total - biases
    assert one.experts == size.experts


def test_stages_together_hold_one_model() -> None:
    config = compose_run(["run=m3_1m", "parallel.pp_layout='5,20,20,15'", "parallel.ep_size=1"])
    stages = stages_of_run(config, 256)
    parts = [
        stage_parameters(config.model, config.attention, config.parallel, stages.layers, stage)
        for stage in range(4)
    ]
    size = model_size(config.model, config.attention)
    assert sum(part.experts for part in parts) == size.experts
    assert sum(part.dense for part in parts) == size.total - size.experts - 57 * 128


def test_tensor_parallel_ranks_share_what_is_cut() -> None:
    config = compose_run(["run=m3_1m", "parallel.pp_layout=even"])
    layers = stages_of_run(config, 256).layers
    whole, half = (
        stage_parameters(
            config.model, config.attention, with_parallel(config, tp_size=tp).parallel, layers, 1
        )
        for tp in (1, 2)
    )
    # norms, routers and index keys of 15 layers are on both
    model = config.model
    both = 15 * (2 * 6144 + 2 * 128 + 6144 * 128 + 2 * 128 + 128 * 6144)
    assert 2 * half.dense - both == whole.dense
    assert model.num_layers == 60


def test_flops_of_a_token() -> None:
    config = compose_run(["run=m3_1m"])
    sparse, dense = (flops_per_token(config, 1, dense=dense) for dense in (False, True))
    # three full layers of 4 * 128 * 64 * 524288 FLOPs forward, 3.5 times that with the backward pass
    full = 3 * 3.5 * 4 * 128 * 64 * 524288
    scoring = 57 * 2 * 128 * 4 * 524288
    assert sparse > full + scoring
    assert dense - sparse == pytest.approx(
        57 * 3.5 * 4 * 128 * 64 * 524288
        - scoring
        - 57 * (3 * 2 * 6144 * 5 * 128 + 3.5 * 4 * 128 * 64 * 2048 + 2 * (128 * 64 + 3 * 128 * 4) * 2048)
    )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((4, 0, 1, 8), [4]), ((4, 3, 1, 8), [1]), ((4, 0, 1, 2), [2]), ((1, 0, 1, 8), [1]),
     ((4, 0, 2, 8), [7, 4]), ((4, 3, 2, 8), [4, 1]), ((2, 0, 2, 2), [2, 2])],
)  # fmt: skip
def test_in_flight(sizes: tuple[int, int, int, int], expected: list[int]) -> None:
    assert in_flight(*sizes) == expected


def test_states_of_a_middle_stage() -> None:
    """The example of `own_parameters`, and 18 bytes of each expert parameter."""
    sizes = ["parallel.pp_layout=even", "parallel.tp_size=1", "parallel.cp_size=64", "parallel.ep_size=64"]
    config = compose_run(["run=m3_1m", *sizes, "optim.moments_dtype=fp32", "optim.grads_dtype=fp32"])
    memory = rank_memory(config, 256, stages_of_run(config, 256), 1, Assumptions())
    counts = memory.parameters
    states = sum(memory.device[part] for part in ("weights", "gradients", "optimizer"))
    assert states == counts.experts * 18 + counts.dense * (6 + 12 / 64)
    assert own_parameters(config, 256, counts) == counts.experts + counts.dense / 64
    # what the real step of this rank was found to hold between steps
    assert states / GIB == pytest.approx(43.4, abs=0.5)


def test_recompute_keeps_less_and_takes_longer() -> None:
    held = ["train.offload_activations=false", "train.tile_tokens=0"]
    config = compose_run(["run=m3_200k", "data.seq_len=32768", "parallel.pp_layout=even", *held])
    machine = Machine(PRESETS["h100"], load_rates("h100_assumed"))
    assumed, stages = Assumptions(), stages_of_run(config, 128)
    full = replace(config, train=replace(config.train, recompute=Recompute.full))
    none = replace(config, train=replace(config.train, recompute=Recompute.none))
    times = {
        name: step_time(one, 128, stages, LayerTimes(one, machine, assumed), assumed)
        for name, one in (("full", full), ("none", none))
    }
    kept = {
        name: rank_memory(one, 128, stages, 0, assumed).device["kept activations"]
        for name, one in (("full", full), ("none", none))
    }
    assert kept["none"] > 5 * kept["full"]
    assert "recompute" in times["full"].parts
    assert "recompute" not in times["none"].parts
    assert times["full"].seconds > times["none"].seconds
    for time in times.values():
        assert sum(time.parts.values()) == pytest.approx(time.seconds)
        assert time.tokens_per_s * time.seconds * 128 == pytest.approx(16 * 32768)


def test_dispatch_crosses_the_network_once_per_row() -> None:
    cluster = PRESETS["h100"]
    assert dispatch_seconds(65536, 6144, 1, cluster) == 0
    inside, across = (dispatch_seconds(65536, 6144, ep, cluster) for ep in (8, 64))
    assert inside == pytest.approx(65536 * 12288 * 7 / 8 / cluster.node_rate + cluster.node_latency_s)
    assert across == pytest.approx(65536 * 12288 * 56 / 64 / cluster.network_rate + cluster.network_latency_s)


@pytest.mark.parametrize(("run", "world_size"), [("m3_1m", 256), ("m3_200k", 128)])
def test_layouts_of_the_presets_are_even_in_time(run: str, world_size: int) -> None:
    config = compose_run([f"run={run}"])
    world_size = max(world_size, 256)
    machine = Machine(PRESETS["h100"], load_rates("h100_assumed"))
    assumed = Assumptions()
    layout = resolve_layout(config, world_size)
    time = step_time(config, world_size, stages_of(layout), LayerTimes(config, machine, assumed), assumed)
    assert time.imbalance <= 1.1, layout


def test_layout_by_hand_is_taken_as_it_is() -> None:
    stages = stages_of(PipelineLayout(sizes=(1, 1, 2, 2), pp_size=2))
    assert stages.chunks == [[[0], [2, 3]], [[1], [4, 5]]]
    assert stages.layers == [[0, 2, 3], [1, 4, 5]]


@pytest.mark.parametrize("bad", [{"f": 1.5}, {"imbalance": 0.9}, {"num_docs": 0}, {"gpu_memory_gb": 0.0}])
def test_assumptions_out_of_range_are_refused(bad: dict[str, float]) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name}={bad[name]}: must"):
        Assumptions(**bad)  # type: ignore[arg-type]

"""Bytes per parameter of the stages of ZeRO, and the planner and the check of memory that use them."""

from dataclasses import replace

import pytest

from launchers.hydra_config.compose import compose_run
from launchers.local.memory import least_bytes
from msa_train.config import DeepSpeedConfig, Offload, Precision
from msa_train.config.deepspeed.state_bytes import zero_bytes
from msa_train.config.model_size import model_size
from msa_train.plan.assumptions import Assumptions
from msa_train.plan.memory import rank_memory
from msa_train.plan.stages import stages_of_run


@pytest.mark.parametrize(
    ("stage", "whole", "own"), [(1, 6.0, 12.0), (2, 2.0, 16.0), (3, 0.0, 18.0)], ids=lambda value: str(value)
)
def test_bf16_of_each_stage(stage: int, whole: float, own: float) -> None:
    each = zero_bytes(DeepSpeedConfig(zero_stage=stage), Precision.bf16)
    assert sum(each.device(1.0, 0.0).values()) == whole
    assert sum(each.device(0.0, 1.0).values()) == own
    assert each.own_host == 0


def test_nothing_is_partitioned_by_stage_0() -> None:
    for precision, size in ((Precision.fp32, 16.0), (Precision.fp64, 32.0)):
        each = zero_bytes(DeepSpeedConfig(zero_stage=0), precision)
        assert sum(each.device(1.0, 100.0).values()) == size


def test_offload_leaves_what_a_step_computes_with() -> None:
    for stage, whole in ((1, 6.0), (2, 2.0), (3, 0.0)):
        settings = DeepSpeedConfig(zero_stage=stage, offload_optimizer=Offload.cpu)
        each = zero_bytes(settings, Precision.bf16)
        assert sum(each.device(1.0, 0.0).values()) == whole
        assert each.own_state == 0.0
        assert each.own_host >= 16.0
    all_of_it = DeepSpeedConfig(zero_stage=3, offload_optimizer=Offload.cpu, offload_param=Offload.cpu)
    assert sum(zero_bytes(all_of_it, Precision.bf16).device(1.0, 1.0).values()) == 0.0


def test_the_planner_knows_the_stages() -> None:
    """M2 without experts on other ranks: of 64 ranks each holds a 64th of what stage 3 partitions."""
    device = {}
    for stage in (1, 2, 3):
        config = compose_run(
            [
                "run=pretrain",
                "model=tiny",
                "parallel=single",
                "engine=deepspeed",
                f"deepspeed.zero_stage={stage}",
            ]
        )
        found = rank_memory(config, 64, stages_of_run(config, 64), 0, Assumptions())
        device[stage] = sum(found.device[part] for part in ("weights", "gradients", "optimizer"))
        held = found.parameters.dense + found.parameters.experts
        each = zero_bytes(config.deepspeed, config.train.precision)
        assert device[stage] == pytest.approx(sum(each.device(held, held / 64).values()))
    assert device[1] > device[2] > device[3]


def test_a_machine_holds_less_with_partitions() -> None:
    def of_model(*overrides: str) -> int:
        config = compose_run(["run=smoke", "parallel=single", "train.precision=bf16", *overrides])
        return least_bytes(config, 2)[f"model={config.model.name}"]

    config = compose_run(["run=smoke"])
    size = model_size(config.model, config.attention).total
    assert of_model("engine=torch") == 2 * 16 * size
    assert of_model("engine=deepspeed", "deepspeed.zero_stage=3") == pytest.approx(18 * size, rel=1e-6)


def test_files_take_the_place_of_memory() -> None:
    """70B parameters on 16 ranks: 4 bytes each for gradients, and buffers of a fixed size, are what stays."""
    settings = DeepSpeedConfig(zero_stage=3, offload_optimizer=Offload.nvme, offload_param=Offload.nvme)
    each, own = zero_bytes(settings, Precision.bf16), 70e9 / 16
    assert sum(each.device(70e9, own).values()) == 0.0
    assert each.host_buffers(own) == (3 * 4 + 2) * 50_000_000
    assert each.host(own) == 4 * own + each.host_buffers(own)
    assert each.own_file == 14.0
    assert each.files(own) == 28 * own
    settings = replace(
        settings, offload_param=Offload.none, raw={"zero_optimization": {"sub_group_size": 1000}}
    )
    each = zero_bytes(settings, Precision.bf16)
    assert sum(each.device(1.0, 1.0).values()) == 2.0
    assert (each.host_buffers(1e6), each.own_file) == (12 * 1000, 12.0)
    assert each.host_buffers(10.0) == 120.0
    in_memory = zero_bytes(DeepSpeedConfig(zero_stage=3, offload_optimizer=Offload.cpu), Precision.bf16)
    assert (in_memory.files(1.0), in_memory.host(1.0)) == (0.0, 16.0)

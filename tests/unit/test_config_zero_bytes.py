"""Bytes per parameter of the stages of ZeRO, and the planner and the check of memory that use them."""

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

"""Scaling of the rotary embedding: frequencies against a plain reference and transformers, stages, rules."""

import math
from typing import Any

import pytest
import torch

from msa_train.checkpoint.compatibility import check_recorded_stages, last_rope
from msa_train.config import (
    DataConfig,
    ModelConfig,
    Rope,
    RopeType,
    RunConfig,
    StageConfig,
    StageRope,
    TrainConfig,
    check_rules,
    plan_stages,
    rope_note,
    rope_of_model,
)
from msa_train.model.layers.rotary import frequencies, rotary_table

HEAD_DIM, THETA = 128, 5e6
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": RopeType.linear, "rope_factor": 4.0},
    "ntk": {"rope_type": RopeType.ntk, "rope_factor": 4.0},
    "yarn": {"rope_type": RopeType.yarn, "rope_factor": 5.0, "rope_original_length": 196608},
    "yarn_short": {"rope_type": RopeType.yarn, "rope_factor": 8.0, "rope_original_length": 2048},
    "yarn_given": {
        "rope_type": RopeType.yarn,
        "rope_factor": 3.5,
        "rope_original_length": 32768,
        "rope_beta_fast": 20.0,
        "rope_beta_slow": 2.0,
        "rope_mscale": 0.8,
        "rope_mscale_all_dim": 1.3,
        "rope_truncate": False,
    },
    "yarn_attention": {
        "rope_type": RopeType.yarn,
        "rope_factor": 3.5,
        "rope_original_length": 4096,
        "rope_attention_factor": 1.25,
    },
    "yarn_no_ramp": {"rope_type": RopeType.yarn, "rope_factor": 2.0, "rope_original_length": 4},
}


def model_of(kind: str, **changes: Any) -> ModelConfig:
    values = {"head_dim": HEAD_DIM, "rotary_dim": 64, "rope_theta": THETA, **KINDS[kind], **changes}
    return ModelConfig(**values)


def plain(model: ModelConfig) -> tuple[list[float], float]:
    """The definitions, one channel at a time: angle per position of each pair, factor on sine and cosine."""
    d, theta, s = model.rotary_dim, model.rope_theta, model.rope_factor
    free = [theta ** (-2 * i / d) for i in range(d // 2)]
    if model.rope_type is RopeType.default:
        return free, 1.0
    if model.rope_type is RopeType.linear:
        return [f / s for f in free], 1.0
    if model.rope_type is RopeType.ntk:
        longer = theta * s ** (d / (d - 2))
        return [longer ** (-2 * i / d) for i in range(d // 2)], 1.0
    turns = (model.rope_beta_fast or 32, model.rope_beta_slow or 1)
    ends = [
        d * math.log(model.rope_original_length / (2 * math.pi * n)) / (2 * math.log(theta)) for n in turns
    ]
    if model.rope_truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], d - 1)
    high += 0.001 if low == high else 0
    result = []
    for i, f in enumerate(free):
        share = min(max((i - low) / (high - low), 0), 1)
        result.append(f / s * share + f * (1 - share))
    if model.rope_attention_factor:
        return result, model.rope_attention_factor
    if model.rope_mscale:
        over = 0.1 * model.rope_mscale * math.log(s) + 1
        return result, over / (0.1 * model.rope_mscale_all_dim * math.log(s) + 1)
    return result, 0.1 * math.log(s) + 1


@pytest.mark.parametrize("rotary_dim", [64, 128, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_the_plain_definition(kind: str, rotary_dim: int) -> None:
    model = model_of(kind, rotary_dim=rotary_dim)
    rope = rope_of_model(model)
    want, factor = plain(model)
    got = frequencies(rope, rotary_dim)
    wanted = torch.tensor(want, dtype=torch.float64)
    assert ((got - wanted).abs() / wanted).max() < 1e-14
    assert abs(rope.attention_factor - factor) < 1e-15
    position = torch.tensor([0, 1, 17, 1_048_575])
    cos, sin = rotary_table(position, rotary_dim=rotary_dim, rope=rope, dtype=torch.float64)
    angle = position[:, None] * wanted
    # at a million radians the last bit of an angle is 1e-10
    assert (cos - angle.cos() * factor).abs().max() < 1e-9
    assert (sin - angle.sin() * factor).abs().max() < 1e-9


def test_bits_without_scaling_are_those_of_before() -> None:
    position = torch.tensor([0, 3, 199_999, 1_048_575])
    cos, sin = rotary_table(position, rotary_dim=64, rope=Rope(theta=THETA), dtype=torch.float32)
    exponent = torch.arange(0, 64, 2, dtype=torch.float64) / 64
    angle = position.double()[:, None] * THETA**-exponent
    assert torch.equal(cos, angle.cos().float())
    assert torch.equal(sin, angle.sin().float())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "default"])
@pytest.mark.parametrize("rotary_dim", [64, 128])
def test_frequencies_are_those_of_transformers(kind: str, rotary_dim: int) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    from transformers import MiniMaxM2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from msa_train.convert.config_rotary import write_rotary

    model = model_of(kind, rotary_dim=rotary_dim)
    parameters = write_rotary(model) | {"partial_rotary_factor": rotary_dim / HEAD_DIM}
    name, seq_len = parameters["rope_type"], None
    if kind == "ntk":
        # theirs has grown by factor * L / original - (factor - 1) at length L: by 4 at twice the original
        parameters |= {"rope_type": "dynamic", "rope_theta": THETA, "factor": 3.0}
        name, seq_len = "dynamic", 2 * 4096
    config = MiniMaxM2Config(
        head_dim=HEAD_DIM, rope_parameters=parameters, max_position_embeddings=4096, rotary_dim=None
    )
    want, factor = ROPE_INIT_FUNCTIONS[name](config, seq_len=seq_len)
    rope = rope_of_model(model)
    got = frequencies(rope, rotary_dim)
    # theirs are fp32
    assert ((got - want.double()).abs() / want.double()).max() < 1e-6
    assert abs(rope.attention_factor - factor) < 1e-15


def staged() -> RunConfig:
    return RunConfig(
        data=DataConfig(seq_len=512),
        train=TrainConfig(steps=9, global_batch_size=1),
        stages={
            "short": StageConfig(tokens=3 * 512),
            "middle": StageConfig(tokens=3 * 512, rope_type=StageRope.linear, rope_factor=2.0),
            "long": StageConfig(
                rope_type=StageRope.yarn, rope_theta=1e4, rope_factor=4.0, rope_original_length=256
            ),
        },
    )


def test_stages_change_the_rotary_embedding() -> None:
    config = staged()
    check_rules(config, world_size=1, has_gpu=False)
    short, middle, long = plan_stages(config)
    assert short.rope == rope_of_model(config.model) == Rope(theta=10.0)
    assert middle.rope == Rope(theta=10.0, type=RopeType.linear, factor=2.0)
    assert (long.rope.theta, long.rope.original_length) == (1e4, 256)
    assert long.rope.attention_factor == 0.1 * math.log(4) + 1
    stages = (short, middle, long)
    assert [rope_note(stage, stages) for stage in stages] == [
        ", RoPE default, theta 10",
        ", RoPE linear, theta 10, factor 2",
        ", RoPE yarn, theta 10000, factor 4, from 256 tokens",
    ]
    assert rope_note(short, (short, short)) == ""


def test_a_stage_without_its_own_has_the_models() -> None:
    config = staged()
    config.model.rope_type, config.model.rope_factor = RopeType.yarn, 2.0
    config.model.rope_original_length = 128
    config.stages["middle"] = StageConfig(tokens=512, rope_type=StageRope.default)
    config.stages["long"] = StageConfig(rope_factor=8.0)
    check_rules(config, world_size=1, has_gpu=False)
    short, middle, long = plan_stages(config)
    assert short.rope == rope_of_model(config.model)
    assert middle.rope == Rope(theta=10.0)
    assert (long.rope.factor, long.rope.original_length) == (8.0, 128)


def test_checkpoints_know_the_stage_that_trained_them() -> None:
    config = staged()
    meta: dict[str, Any] = {"step": 8, "stages": [stage.record() for stage in plan_stages(config)]}
    check_recorded_stages(meta, config)
    assert last_rope(meta) == {
        "rope_theta": 1e4,
        "rope_type": "yarn",
        "rope_factor": 4.0,
        "rope_original_length": 256,
    }
    assert last_rope({"step": 0}) == {}
    config.stages["middle"].rope_factor = 3.0
    with pytest.raises(ValueError, match=r"^stages: .* with rope=.*'factor': 2.0.*now it is .*3.0"):
        check_recorded_stages(meta, config)
    # of an earlier version: all stages had the model's
    old = {
        "step": 8,
        "stages": [{k: v for k, v in stage.items() if k != "rope"} for stage in meta["stages"]],
    }
    with pytest.raises(ValueError, match=r"in stage 2 \(middle\)"):
        check_recorded_stages(old, config)


YARN = {"rope_type": RopeType.yarn, "rope_factor": 4.0, "rope_original_length": 64}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"rope_factor": 0.5}, {}, "model.rope_factor=0.5: must be at least 1"),
    ({"rope_factor": 2.0}, {}, "model.rope_factor=2: rope_type=default scales nothing"),
    ({"rope_original_length": 64}, {}, "model.rope_original_length=64: only yarn needs it"),
    ({**YARN, "rope_original_length": 0}, {}, "model.rope_original_length=0: rope_type=yarn needs"),
    ({**YARN, "rope_original_length": -1}, {}, "model.rope_original_length=-1: must not be negative"),
    ({**YARN, "rope_theta": 1.0}, {}, "model.rope_theta=1: must be above 1"),
    ({**YARN, "rope_beta_fast": 0.5}, {}, "model.rope_beta_fast=0.5: must be at least model.rope_beta_slow"),
    ({**YARN, "rope_beta_slow": -1.0}, {}, "model.rope_beta_slow=-1: must be positive"),
    ({**YARN, "rope_mscale": 1.0}, {}, "model.rope_mscale=1: has an effect beside model.rope_mscale_all_dim"),
    ({**YARN, "rope_mscale_all_dim": 1.0}, {}, "model.rope_mscale_all_dim=1: has an effect beside"),
    ({"rope_beta_fast": 16.0}, {}, "model.rope_beta_fast=16: only yarn reads it"),
    ({"rope_truncate": False}, {}, "model.rope_truncate=false: only yarn reads it"),
    ({"rope_type": RopeType.linear}, {}, "model.rope_factor=1: rope_type=linear scales nothing with it"),
    ({}, {"rope_type": StageRope.yarn}, "stages.one.rope_factor=1: rope_type=yarn scales nothing with it"),
    (
        {"rope_type": RopeType.ntk, "rope_factor": 2.0, "rotary_dim": 2},
        {},
        "model.rope_type=ntk: needs 4 rotated channels",
    ),
    ({}, {"rope_theta": -1.0}, "stages.one.rope_theta=-1: must be positive"),
    ({}, {"rope_factor": 0.5}, "stages.one.rope_factor=0.5: must be at least 1"),
    ({}, {"rope_factor": 2.0}, "stages.one.rope_factor=2: rope_type=default scales nothing"),
    (YARN, {"rope_type": StageRope.default, "rope_factor": 2.0}, "stages.one.rope_factor=2: rope_type=def"),
    ({}, {"rope_type": StageRope.yarn, "rope_factor": 2.0}, "stages.one.rope_original_length=0: rope_type"),
    (
        {},
        {"rope_type": StageRope.linear, "rope_factor": 2.0, "rope_original_length": 9},
        "stages.one.rope_original_length=9: only yarn",
    ),
]


@pytest.mark.parametrize(("model", "stage", "line"), REFUSED)
def test_refused(model: dict[str, Any], stage: dict[str, Any], line: str) -> None:
    config = RunConfig(model=ModelConfig(**model), data=DataConfig(seq_len=512))
    config.attention.index_head_dim = 32
    if stage:
        config.stages = {"one": StageConfig(**stage)}
    with pytest.raises(ValueError) as caught:
        check_rules(config, world_size=1, has_gpu=False)
    assert str(caught.value).startswith(line), caught.value
    assert "\n" not in str(caught.value)

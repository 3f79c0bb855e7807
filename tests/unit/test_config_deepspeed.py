"""engine=deepspeed: its rules, and the JSON that follows from a run."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from launchers.hydra_config.compose import compose_run
from launchers.local import engine_checks
from msa_train.config import RunConfig, check_rules, contradictions
from msa_train.config.deepspeed.raw import check_raw
from msa_train.config.deepspeed.to_json import deepspeed_json


def composed(*overrides: str) -> RunConfig:
    return compose_run(["run=smoke", "engine=deepspeed", *overrides])


def check(*overrides: str) -> None:
    check_rules(composed(*overrides), world_size=2, has_gpu=False)


@pytest.mark.parametrize(
    ("overrides", "name", "fix"),
    [
        (["deepspeed=zero3"], "parallel.ep_size=2", "use deepspeed.zero_stage=2, parallel.ep_size=1"),
        (["parallel.tp_size=2", "parallel.cp_size=1"], "parallel.tp_size=2", "engine=megatron"),
        (
            ["parallel.pp_size=2", "parallel.cp_size=1", "parallel.ep_size=1"],
            "parallel.pp_size=2",
            "engine=megatron",
        ),
        (
            ["parallel.overlap_grad_reduce=true"],
            "parallel.overlap_grad_reduce=true",
            "deepspeed.overlap_comm",
        ),
        (["optim.algorithm=muon"], "optim.algorithm=muon", "optim.algorithm=adamw"),
        (["optim.moments_dtype=bf16"], "optim.moments_dtype=bf16", "optim.moments_dtype=fp32"),
        (
            ["train.precision=bf16", "optim.grads_dtype=bf16"],
            "optim.grads_dtype=bf16",
            "optim.grads_dtype=fp32",
        ),
        (["optim.offload=0.5"], "optim.offload=0.5", "deepspeed.offload_optimizer=cpu"),
        (["train.precision=fp64"], "train.precision=fp64", "engine=torch"),
        (["train.precision=bf16", "deepspeed.zero_stage=0"], "deepspeed.zero_stage=0", "zero_stage=1"),
        (["deepspeed.zero_stage=4"], "deepspeed.zero_stage=4", "from 0 to 3"),
        (["deepspeed.zero_stage=-1"], "deepspeed.zero_stage=-1", "from 0 to 3"),
        (["deepspeed.offload_param=cpu"], "deepspeed.offload_param=cpu", "deepspeed.zero_stage=3"),
        (
            ["deepspeed.zero_stage=0", "deepspeed.offload_optimizer=cpu"],
            "deepspeed.offload_optimizer=cpu",
            "deepspeed.zero_stage=1",
        ),
        (["deepspeed.offload_optimizer=nvme"], "deepspeed.offload_optimizer=nvme", "deepspeed.zero_stage=3"),
        (
            ["deepspeed=zero3", "parallel.ep_size=1", "deepspeed.offload_optimizer=nvme"],
            "deepspeed.nvme_path=",
            "deepspeed.nvme_path=/local_nvme",
        ),
        (["deepspeed.reduce_bucket_size=0"], "deepspeed.reduce_bucket_size=0", "at least 1"),
        (["deepspeed.allgather_bucket_size=7"], "deepspeed.allgather_bucket_size=7", "_size=8"),
        (["deepspeed.param_persistence_threshold=-1"], "deepspeed.param_persistence_threshold=-1", "use 0"),
        (["deepspeed.raw.train_batch_size=4"], "deepspeed.raw.train_batch_size=4", "global_batch_size"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: Sequence[str], name: str, fix: str) -> None:
    with pytest.raises(ValueError) as refused:
        check(*overrides)
    text = str(refused.value)
    assert text.startswith(f"{name}: ")
    assert fix in text
    assert "\n" not in text


@pytest.mark.parametrize("overrides", [[], ["deepspeed=zero1"], ["deepspeed=zero2_offload"]])
def test_shipped_options_are_accepted(overrides: Sequence[str]) -> None:
    check(*overrides)
    check("deepspeed=zero3_offload", "parallel.ep_size=1")


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("gradient_accumulation_steps", "train.global_batch_size"),
        ("gradient_clipping", "optim.clip_grad"),
        ("bf16.enabled", "train.precision"),
        ("fp16.enabled", "train.precision"),
        ("optimizer.type", "optim."),
        ("scheduler.type", "optim."),
        ("zero_optimization.stage", "deepspeed.zero_stage"),
        ("zero_optimization.zero_quantized_gradients", "leave it out"),
        ("sequence_parallel_size", "parallel.cp_size"),
        ("mesh_param", "parallel.cp_size"),
        ("zero_optimization.sequence_parallel_size", "parallel.cp_size"),
        ("tiled_mlp.shards", "train.tile_tokens"),
        ("alst.tiled_logits", "train.tile_tokens"),
        ("pipeline.stages", "parallel.pp_size"),
        ("tensor_parallel.autotp_size", "parallel.tp_size"),
        ("compile.deepcompile", "leave it out"),
        ("zero_optimisation.sub_group_size", "zero_optimization"),
    ],
)
def test_raw_contradicts_nothing(key: str, fix: str) -> None:
    raw: object = 1
    for name in reversed(key.split(".")):
        raw = {name: raw}
    with pytest.raises(ValueError) as refused:
        check_raw(raw)  # type: ignore[arg-type]
    assert str(refused.value).startswith(f"deepspeed.raw.{key}=1: ")
    assert fix in str(refused.value)


def test_raw_is_merged_in_last_and_deep() -> None:
    """By one value or by a mapping, on the command line."""
    for text in (
        "deepspeed.raw.zero_optimization.sub_group_size=12",
        "deepspeed.raw={zero_optimization:{sub_group_size:12}}",
    ):
        config = composed("deepspeed.zero_stage=1", text, "deepspeed.raw.dump_state=true")
        check_rules(config, world_size=2, has_gpu=False)
        made = deepspeed_json(config)
        assert made["zero_optimization"]["sub_group_size"] == 12
        assert made["zero_optimization"]["stage"] == 1
        assert made["dump_state"] is True


def test_json_neither_clips_nor_divides() -> None:
    for overrides in (["deepspeed=zero1"], ["deepspeed=zero2"], ["train.precision=bf16"]):
        made = deepspeed_json(composed(*overrides))
        assert made["gradient_clipping"] == 0.0
        assert made["gradient_accumulation_steps"] == 1
        assert made["gradient_allreduce_op"] == "sum"
        assert made["communication_data_type"] == "fp32"
        assert made["data_types"]["grad_accum_dtype"] == "fp32"
        assert json.loads(json.dumps(made, allow_nan=False)) == made
    # ZeRO-3 has no sum
    assert "gradient_allreduce_op" not in deepspeed_json(composed("deepspeed=zero3"))
    assert deepspeed_json(composed("train.precision=bf16"))["bf16"] == {
        "enabled": True,
        "check_grad_overflow": False,
        "immediate_grad_update": True,
    }


def test_json_says_where_states_are() -> None:
    made = deepspeed_json(
        composed(
            "deepspeed=zero3",
            "deepspeed.offload_optimizer=nvme",
            "deepspeed.offload_param=cpu",
            "deepspeed.nvme_path=/disk",
        )
    )["zero_optimization"]
    assert made["offload_optimizer"] == {"device": "nvme", "nvme_path": "/disk"}
    assert made["offload_param"] == {"device": "cpu"}


def test_settings_without_effect_are_named() -> None:
    config = compose_run(["run=smoke", "engine=torch", "deepspeed=zero3"])
    assert any("does not look at deepspeed.*" in line for line in contradictions(config))
    assert not any("deepspeed" in line for line in contradictions(compose_run(["run=smoke"])))


def test_package_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_checks, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"engine=deepspeed: the deepspeed package is not installed; install"
    ):
        engine_checks.check_deepspeed_here(composed())
    engine_checks.check_deepspeed_here(compose_run(["run=smoke"]))


def test_nvme_needs_a_folder_here() -> None:
    config = composed("deepspeed=zero3", "deepspeed.offload_param=nvme", "deepspeed.nvme_path=/no/such/place")
    with pytest.raises(ValueError, match=r"deepspeed\.nvme_path=/no/such/place: is no folder"):
        engine_checks.check_deepspeed_here(config)


def test_what_is_on_nvme_could_not_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_checks, "find_library", lambda name: f"lib{name}.so")
    config = composed(
        "deepspeed=zero3", "deepspeed.offload_optimizer=nvme", f"deepspeed.nvme_path={tmp_path}"
    )
    with pytest.raises(
        ValueError, match=r"^deepspeed\.offload_optimizer=nvme: .*; use deepspeed\.offload_opt"
    ):
        engine_checks.check_deepspeed_here(config)

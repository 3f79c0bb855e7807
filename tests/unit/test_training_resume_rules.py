"""What a run that goes on is told about its learning rate and its index branch, before any worker starts."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from msa_train.config import (
    AttentionConfig,
    LrSchedule,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    plan_stages,
)
from msa_train.training.lr_schedule import learning_rate
from msa_train.training.resume_rules import (
    INDEX_NAME,
    check_index_moments,
    schedule_notes,
    schedule_record,
    train_on_settings,
)

MOMENTS = "optimizer.state.exp_avg.decoder.layers.0.self_attention."


def config_of(steps: int, kl_weight: float = 1.0, **optim: object) -> RunConfig:
    values = {"lr": 4e-3, "warmup_steps": 4, **optim}
    return RunConfig(
        train=TrainConfig(steps=steps),
        optim=OptimConfig(**values),  # type: ignore[arg-type]
        attention=AttentionConfig(kl_weight=kl_weight),
    )


def notes(before: RunConfig, now: RunConfig, step: int) -> list[str]:
    return schedule_notes({"step": step, "schedule": schedule_record(before, step)}, now)


def test_a_longer_run_is_told_where_its_rate_goes_on() -> None:
    (note,) = notes(config_of(20), config_of(40), 20)
    assert note == (
        "train.steps=40: the learning rate goes on at 0.00236, that of the checkpoint, over 20 steps, would "
        "go on at 0.0004; optim.schedule_steps=20 keeps to that schedule"
    )
    (note,) = notes(config_of(20), config_of(20, lr=8e-3), 10)
    assert note.startswith("optim.lr=0.008: the learning rate goes on at ")
    assert "keeps to" not in note
    (note,) = notes(config_of(20), config_of(20, schedule_steps=30), 10)
    assert note.startswith("optim.schedule_steps=30: ")


def test_nothing_is_said_where_the_rate_goes_on_smoothly() -> None:
    assert notes(config_of(20), config_of(20), 10) == []
    assert notes(config_of(20), config_of(40, schedule_steps=20), 20) == []
    assert (
        notes(config_of(20, schedule=LrSchedule.constant), config_of(40, schedule=LrSchedule.constant), 20)
        == []
    )
    assert notes(config_of(20), config_of(40), 2) == [], "in the warm-up both are the same"
    assert notes(config_of(20), config_of(10), 20) == [], "nothing is left to do"


def test_a_checkpoint_without_a_record_of_its_schedule_is_said() -> None:
    (note,) = schedule_notes({"step": 3}, config_of(40))
    assert note == (
        "the checkpoint of step 3 has no record of its schedule; the learning rate goes on at 0.004, "
        "unchecked"
    )
    assert schedule_notes({"step": 40}, config_of(40)) == [], "nothing is left to do"


@pytest.mark.parametrize("schedule", LrSchedule)
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1])
@pytest.mark.parametrize("steps", [2, 20])
def test_the_advice_goes_on_at_the_last_rate(schedule: LrSchedule, min_lr_ratio: float, steps: int) -> None:
    config = config_of(steps, schedule=schedule, min_lr_ratio=min_lr_ratio)
    settings = dict(text.split("=") for text in train_on_settings(config, steps))
    assert settings.pop("train.steps") == str(2 * steps)
    changes = {key.removeprefix("optim."): float(value) for key, value in settings.items()}
    later = replace(config, optim=replace(config.optim, **changes))
    last = learning_rate(steps - 1, config.optim, steps)
    following = [learning_rate(step, later.optim, 2 * steps) for step in range(steps, 2 * steps)]
    if last == 0:
        # nothing would be learned at the rate that it ended with
        assert following == [0.1 * config.optim.lr] * steps
    elif steps > config.optim.warmup_steps:
        assert following == [last] * steps
    else:
        assert changes == {}


def test_the_advice_lets_the_last_stage_go_on() -> None:
    config = config_of(0)
    config.stages = {"warm": StageConfig(tokens=8192 * 2), "sparse": StageConfig(tokens=8192 * 6)}
    assert plan_stages(config)[-1].last_step == 8
    assert train_on_settings(config, 8) == [
        "train.steps=16",
        "stages.sparse.tokens=0",
        "optim.schedule_steps=8",
    ]
    config.train.steps, config.stages["sparse"].tokens = 16, 0
    assert plan_stages(config)[-1].last_step == 16


def test_moments_of_the_index_branch_are_there_or_not_on_both_sides(tmp_path: Path) -> None:
    def folder(*keys: str) -> Path:
        (tmp_path / INDEX_NAME).write_bytes(pickle.dumps({key: None for key in keys}))
        return tmp_path

    trained = folder(f"{MOMENTS}linear_qkv.weight", f"{MOMENTS}index_branch.linear_q.weight")
    check_index_moments(trained, config_of(20))
    with pytest.raises(ValueError, match=r"attention\.kl_weight=0: .* has trained .*optim\.index_lr_scale=0"):
        check_index_moments(trained, config_of(20, kl_weight=0.0))
    full = replace(config_of(20, kl_weight=0.0), model=ModelConfig(layer_attention="full"))
    check_index_moments(trained, full)
    untrained = folder(f"{MOMENTS}linear_qkv.weight", "decoder.layers.0.index_branch.linear_q.weight")
    check_index_moments(untrained, config_of(20, kl_weight=0.0))
    with pytest.raises(
        ValueError, match=r"attention\.kl_weight=0\.5: .* lacks .*use attention\.kl_weight=0,"
    ):
        check_index_moments(untrained, config_of(20, kl_weight=0.5))
    for other in (folder("decoder.layers.0.index_branch.weight"), folder(), tmp_path / "nowhere"):
        check_index_moments(other, config_of(20))

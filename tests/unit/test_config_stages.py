"""Plans of stages: steps, data positions, learning rates, and what is refused."""

import pytest

from msa_train.checkpoint.stage_record import check_recorded_stages
from msa_train.config import (
    DataConfig,
    KlTarget,
    RunConfig,
    Stage,
    StageAttention,
    StageConfig,
    TrainConfig,
    check_rules,
    longest_seq_len,
    plan_stages,
    stage_at,
    total_steps,
)
from msa_train.training.optim.lr_schedule import LearningRates, learning_rate, stage_rates


def run_of(stages: dict[str, StageConfig], *, steps: int = 0, batch: int = 2) -> RunConfig:
    config = RunConfig(
        stages=stages,
        data=DataConfig(seq_len=1024),
        train=TrainConfig(steps=steps, global_batch_size=batch),
    )
    config.optim.warmup_steps = 0
    return config


def three_stages() -> dict[str, StageConfig]:
    return {
        "warm": StageConfig(tokens=2 * 512 * 3 - 1, seq_len=512, attention=StageAttention.dense),
        "sparse": StageConfig(tokens=2 * 1024 * 4, warmup_steps=2, index_lr_scale=0.5),
        "long": StageConfig(tokens=2 * 1024 * 2, lr_scale=0.1),
    }


def test_no_stages_is_one_sparse_stage() -> None:
    config = run_of({}, steps=7)
    (stage,) = plan_stages(config)
    assert (stage.first_step, stage.last_step, stage.seq_len) == (0, 7, 1024)
    assert (stage.attention, stage.kl) == (StageAttention.sparse, KlTarget.selected)
    check_rules(config, world_size=2, has_gpu=False)


def test_stages_follow_one_another() -> None:
    config = run_of(three_stages())
    warm, sparse, long = plan_stages(config)
    assert [(s.first_step, s.num_steps) for s in (warm, sparse, long)] == [(0, 3), (3, 4), (7, 2)]
    assert (warm.kl, sparse.kl) == (KlTarget.causal, KlTarget.selected)
    # 3,072 tokens seen are three packs of 1,024; the last stage has the same length and goes on.
    assert [s.first_pack for s in (warm, sparse, long)] == [0, 3, 3 + 4 * 2]
    assert [s.first_token for s in (warm, sparse, long)] == [0, 3072, 3072 + 8192]
    assert sparse.pack_at(4, 2) == 5
    assert sparse.tokens_at(4, 2) == 3072 + 2048
    assert total_steps(config) == 9
    assert longest_seq_len(config) == 1024
    assert [stage_at((warm, sparse, long), step).name for step in (0, 2, 3, 6, 7, 50)] == [
        "warm", "warm", "sparse", "sparse", "long", "long",
    ]  # fmt: skip
    check_rules(config, world_size=2, has_gpu=False)


def test_train_steps_cuts_stages_off_or_lengthens_the_last() -> None:
    assert [s.name for s in plan_stages(run_of(three_stages(), steps=5))] == ["warm", "sparse"]
    open_ended = three_stages()
    open_ended["long"].tokens = 0
    assert plan_stages(run_of(open_ended, steps=20))[-1].num_steps == 13


def test_rates() -> None:
    config = run_of(three_stages())
    config.optim.index_lr_scale = 4.0
    plan = plan_stages(config)

    def rates(step: int) -> LearningRates:
        return stage_rates(step, config.optim, stage_at(plan, step), 9)

    base = [learning_rate(step, config.optim, 9) for step in range(9)]
    assert rates(0) == LearningRates(backbone=base[0], index=4 * base[0])
    assert rates(3) == LearningRates(backbone=base[3] / 2, index=4 * base[3] / 2 * 0.5)
    assert rates(4) == LearningRates(backbone=base[4], index=4 * base[4] * 0.5)
    assert rates(8) == LearningRates(backbone=base[8] * 0.1, index=4 * base[8])


def without_kl(config: RunConfig) -> None:
    config.attention.kl_weight = 0.0
    config.stages["warm"].lr_scale = 0.0


def unknown_length(config: RunConfig) -> None:
    config.stages["warm"].tokens = 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (unknown_length, "stages.warm.tokens=0: only the last stage may go on"),
        (lambda c: setattr(c.train, "steps", 10), "train.steps=10: the stages end after 9 steps"),
        (lambda c: setattr(c.stages["long"], "tokens", 0), "train.steps=0: leaves no end to stage long"),
        (lambda c: setattr(c.stages["warm"], "kl", KlTarget.selected), "stages.warm.kl=selected: with"),
        (lambda c: setattr(c.stages["sparse"], "kl", KlTarget.causal), "stages.sparse.kl=causal: with"),
        (without_kl, "stages.warm.lr_scale=0: freezes the backbone, and the index branch"),
        (lambda c: setattr(c.stages["warm"], "seq_len", 500), "stages.warm.seq_len=500: must be a multiple"),
        (lambda c: setattr(c.stages["warm"], "lr_scale", -1.0), "stages.warm.lr_scale=-1.0: must not be"),
        (lambda c: c.stages.update({"a-b": StageConfig(tokens=1)}), "stages.a-b: must be a name"),
    ],
)
def test_refused(change: object, text: str) -> None:
    config = run_of(three_stages())
    assert callable(change)
    change(config)
    with pytest.raises(ValueError, match="^" + text.replace(".", r"\.")):
        check_rules(config, world_size=2, has_gpu=False)


def recorded(plan: tuple[Stage, ...], step: int) -> dict[str, object]:
    return {"step": step, "stages": [stage.record() for stage in plan if stage.first_step < step]}


def test_trained_stages_may_not_change() -> None:
    config = run_of(three_stages())
    meta = recorded(plan_stages(config), step=5)
    check_recorded_stages(meta, config)
    config.stages["sparse"].tokens *= 2
    config.stages["long"].tokens *= 2
    check_recorded_stages(meta, config)
    config.stages["warm"].tokens *= 2
    with pytest.raises(ValueError, match=r"num_steps=3 in stage 1 \(warm\), now it is 6"):
        check_recorded_stages(meta, config)
    with pytest.raises(ValueError, match=r"name=warm in stage 1 \(warm\), now it is main"):
        check_recorded_stages(meta, run_of({}, steps=9))

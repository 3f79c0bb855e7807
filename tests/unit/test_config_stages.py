"""Plans of stages: steps, data positions, learning rates, and what is refused."""

import re

import pytest

from launchers.local.kernel_checks import check_kernel
from msa_train.checkpoint.compatibility import check_recorded_stages
from msa_train.config import (
    AlternateConfig,
    AttentionKernel,
    DataConfig,
    EngineKind,
    KlTarget,
    RunConfig,
    Stage,
    StageAttention,
    StageConfig,
    StageRecompute,
    StageSchedule,
    TrainConfig,
    check_rules,
    longest_seq_len,
    pack_lengths,
    plan_stages,
    stage_at,
    total_steps,
)
from msa_train.config.lr_schedule import LearningRates, learning_rate, stage_rates
from msa_train.config.staging.views import check_views, has_layouts, layouts


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
    # packs of another length hold what is left; the last stage has the same length and goes on in them
    assert [(s.stream, s.first_pack) for s in (warm, sparse, long)] == [(0, 0), (1, 0), (1, 4 * 2)]
    assert [s.first_sample for s in (warm, sparse, long)] == [0, 6, 14]
    assert [s.first_token for s in (warm, sparse, long)] == [0, 3072, 3072 + 8192]
    assert sparse.pack_at(4) == 2
    assert sparse.tokens_at(4) == 3072 + 2048
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


def test_own_rates() -> None:
    stages = three_stages()
    stages["sparse"].lr, stages["sparse"].schedule = 2.0, StageSchedule.linear
    stages["sparse"].warmup_steps, stages["sparse"].min_lr_ratio = 0, 0.1
    stages["long"].lr, stages["long"].index_lr = 4e-5, 1e-3
    stages["long"].schedule, stages["long"].lr_scale = StageSchedule.constant, 1.0
    config = run_of(stages)
    config.optim.index_lr_scale = 4.0
    plan = plan_stages(config)
    rates = [stage_rates(step, config.optim, stage_at(plan, step), 9) for step in range(9)]
    assert [rate.backbone for rate in rates[3:7]] == pytest.approx([2.0, 1.4, 0.8, 0.2], rel=1e-12)
    # the run's factor and the stage's
    assert rates[3].index == 2.0 * 4.0 * 0.5
    assert rates[7:] == [LearningRates(backbone=4e-5, index=1e-3)] * 2
    stages["sparse"].schedule = StageSchedule.cosine
    cosine = stage_rates(4, config.optim, plan_stages(config)[1], 9).backbone
    assert cosine == pytest.approx(2.0 * (0.1 + 0.9 * 0.75), rel=1e-12)
    # the run's shape with another peak
    stages["sparse"].schedule = StageSchedule.run
    rate = stage_rates(4, config.optim, plan_stages(config)[1], 9).backbone
    assert rate == pytest.approx(learning_rate(4, config.optim, 9) / config.optim.lr * 2.0, rel=1e-12)


def test_alternate_steps_and_batches() -> None:
    stages = {
        "warm": StageConfig(tokens=3 * 2048, seq_len=512, batch_tokens=2048),
        "long": StageConfig(tokens=10 * 4096, global_batch_size=4),
    }
    stages["long"].alternate = AlternateConfig(every=3, seq_len=128)
    config = run_of(stages)
    warm, long = plan_stages(config)
    assert (warm.global_batch_size, long.global_batch_size, long.alternate.global_batch_size) == (4, 4, 32)
    assert (warm.num_steps, long.num_steps, total_steps(config)) == (3, 10, 13)
    assert [step for step in range(3, 13) if long.is_alternate(step)] == [5, 8, 11]
    assert [long.seq_len_at(step) for step in (4, 5)] == [1024, 128]
    assert [long.batch_at(step) for step in (4, 5)] == [4, 32]
    assert [long.pack_at(step) for step in range(3, 9)] == [0, 4, 0, 8, 12, 32]
    assert [long.tokens_at(step) - 3 * 2048 for step in (3, 5, 6)] == [0, 2 * 4096, 3 * 4096]
    assert [long.samples_at(step) for step in (3, 5, 6)] == [12, 20, 52]
    assert pack_lengths(config) == [512, 1024, 128]
    check_rules(config, world_size=2, has_gpu=False)
    # fewer tokens in short steps: as many steps as it takes
    stages["long"].alternate.global_batch_size = 2
    long = plan_stages(config)[1]
    assert long.tokens_at(long.last_step) >= 3 * 2048 + 10 * 4096 > long.tokens_at(long.last_step - 1)


def layouts_run() -> RunConfig:
    """Two stages of other layouts of two ranks, and one that goes on in the second."""
    stages = three_stages()
    stages["warm"].parallel.cp_size = 2
    stages["warm"].global_batch_size = 3
    stages["long"].recompute = StageRecompute.none
    return run_of(stages)


def test_layouts_of_stages() -> None:
    config = layouts_run()
    check_rules(config, world_size=2, has_gpu=False)
    found = layouts(config)
    assert [[stage.name for stage in stages] for stages, _ in found] == [["warm"], ["sparse", "long"]]
    assert [own.parallel.cp_size for _, own in found] == [2, 1]
    # of any view the same again
    for _, own in found:
        assert [view for _, view in layouts(own)] == [view for _, view in found]
    assert has_layouts(config)
    assert not has_layouts(run_of(three_stages()))
    config.stages["long"].recompute = StageRecompute.full
    assert [own.train.recompute.value for _, own in layouts(config)] == ["none", "none", "full"]


def test_without_checkpoints_no_layout_changes() -> None:
    config = layouts_run()
    config.checkpoint.every = 0
    with pytest.raises(ValueError, match=r"^checkpoint\.every=0: stages of several layouts"):
        check_rules(config, world_size=2, has_gpu=False)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"warm.parallel.cp_size": 3}, "stages.warm.seq_len=512: must be a multiple of parallel.cp_size"),
        ({"long.parallel.cp_size": 4}, "launcher.num_processes=2: must be a multiple of parallel.tp_size"),
        ({"long.parallel.ep_size": 3}, "stages.long.parallel.ep_size=3: must divide model.num_experts"),
        ({"long.parallel.ep_size": 4}, "stages.long.parallel.ep_size=4: must divide the 2 ranks"),
        (
            {"long.parallel.cp_head_size": 2},
            "stages.long.parallel.cp_head_size=2: must divide parallel.",
        ),
        ({"long.parallel.pp_size": -1}, "stages.long.parallel.pp_size=-1: must not be negative"),
        ({"long.parallel.tp_size": 2}, "stages.long.parallel.tp_size=2: engine=torch has"),
        ({"long.global_batch_size": 3}, "stages.long.global_batch_size=3: must be a multiple of the data-"),
        ({"long.batch_tokens": 1000}, "stages.long.batch_tokens=1000: must be a multiple of the 1024"),
        ({"long.batch_tokens": 2048, "long.global_batch_size": 2}, "stages.long.batch_tokens=2048: says the"),
        ({"long.topk": -1}, "stages.long.topk=-1: must not be negative"),
        ({"long.topk": 2**21}, "stages.long.topk=2097152: must be at most"),
        ({"long.lr": -1.0}, "stages.long.lr=-1.0: must not be negative"),
        ({"long.min_lr_ratio": 0.1}, "stages.long.min_lr_ratio=0.1: has no effect"),
        ({"long.min_lr_ratio": 2.0}, "stages.long.min_lr_ratio=2: must be from 0 to 1"),
        ({"long.alternate.seq_len": 128}, "stages.long.alternate.every=0: no step has"),
        ({"long.alternate.every": 1}, "stages.long.alternate.every=1: must be at least 2"),
        ({"long.alternate.every": 2}, "stages.long.alternate.seq_len=0: must be shorter"),
        (
            {"long.alternate.every": 2, "long.alternate.seq_len": 768},
            "stages.long.alternate.seq_len=768: must divide the 2048 tokens",
        ),
        (
            {
                "long.alternate.every": 2,
                "long.alternate.seq_len": 100,
                "long.alternate.global_batch_size": 2,
            },
            "stages.long.alternate.seq_len=100: must be a multiple of parallel.cp_size",
        ),
        (
            {
                "long.alternate.every": 2,
                "long.alternate.seq_len": 128,
                "long.alternate.global_batch_size": 3,
            },
            "stages.long.alternate.global_batch_size=3: must be a multiple of the data-parallel",
        ),
    ],
)
def test_refused_in_one_stage(change: dict[str, object], text: str) -> None:
    config = run_of(three_stages())
    config.engine = EngineKind.torch
    for key, value in change.items():
        *path, name = key.split(".")
        part: object = config.stages[path[0]]
        for step in path[1:]:
            part = getattr(part, step)
        setattr(part, name, value)
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        check_rules(config, world_size=2, has_gpu=False)


def test_topk_beyond_a_tile_names_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msa_kernels.dispatch.has_triton", lambda: True)
    config = run_of(three_stages(), steps=2)
    config.attention.kernel = AttentionKernel.triton
    # also a stage that this run does not reach
    config.stages["long"].topk = 80
    with pytest.raises(ValueError, match=r"topk=80: must be from 1 to 64.*\(in stages\.long\)$"):
        check_views(config, lambda view: check_kernel(view, on_gpu=True))


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

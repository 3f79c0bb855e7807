"""Learning rate at the corners of each schedule."""

import itertools

import pytest

from msa_train.config import LrSchedule, OptimConfig
from msa_train.config.lr_schedule import learning_rate


def rates(total_steps: int, **changes: object) -> list[float]:
    optim = OptimConfig(**{"lr": 1.0, "min_lr_ratio": 0.0, **changes})  # type: ignore[arg-type]
    return [learning_rate(step, optim, total_steps) for step in range(total_steps)]


def test_worked_example() -> None:
    assert rates(5, warmup_steps=2) == pytest.approx([0.5, 1.0, 0.75, 0.25, 0.0], abs=1e-12)


@pytest.mark.parametrize("schedule", list(LrSchedule))
@pytest.mark.parametrize("warmup_steps", [0, 1, 4, 10, 25])
@pytest.mark.parametrize("total_steps", [1, 2, 10, 40])
def test_stays_within_bounds_and_changes_smoothly(
    schedule: LrSchedule, warmup_steps: int, total_steps: int
) -> None:
    got = rates(total_steps, schedule=schedule, warmup_steps=warmup_steps, lr=2.0, min_lr_ratio=0.1)
    assert all(0.0 < rate <= 2.0 for rate in got)
    warm = got[: warmup_steps or 1]
    assert warm == sorted(warm)
    assert all(later <= earlier for earlier, later in itertools.pairwise(got[max(warmup_steps - 1, 0) :]))


def test_warmup_starts_at_a_share_and_reaches_the_peak() -> None:
    got = rates(100, warmup_steps=10)
    assert got[0] == pytest.approx(0.1)
    assert got[9] == 1.0
    assert got[10] < 1.0


def test_no_warmup_starts_at_the_peak() -> None:
    assert rates(10, warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize("schedule", [LrSchedule.cosine, LrSchedule.wsd])
def test_last_update_has_the_minimum(schedule: LrSchedule) -> None:
    assert rates(50, schedule=schedule, warmup_steps=5, min_lr_ratio=0.25)[-1] == pytest.approx(0.25)


def test_cosine_is_halfway_in_the_middle() -> None:
    assert rates(101, warmup_steps=0, min_lr_ratio=0.5)[50] == pytest.approx(0.75)


def test_wsd_holds_then_falls_linearly() -> None:
    got = rates(100, schedule=LrSchedule.wsd, warmup_steps=10, decay_fraction=0.2)
    assert got[9:80] == [1.0] * 71
    assert got[79:] == pytest.approx([1 - i / 20 for i in range(21)])


def test_wsd_without_decay_stays_until_the_last_update() -> None:
    assert rates(10, schedule=LrSchedule.wsd, warmup_steps=0, decay_fraction=0.0) == [1.0] * 10


def test_wsd_decay_does_not_cut_into_the_warmup() -> None:
    got = rates(10, schedule=LrSchedule.wsd, warmup_steps=8, decay_fraction=1.0)
    assert got[:8] == pytest.approx([(i + 1) / 8 for i in range(8)])
    assert got[8:] == pytest.approx([0.5, 0.0])


def test_constant_ignores_the_minimum() -> None:
    assert rates(10, schedule=LrSchedule.constant, warmup_steps=2)[1:] == [1.0] * 9


def test_steps_after_the_end_keep_the_minimum() -> None:
    optim = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=0)
    assert learning_rate(500, optim, 100) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", list(LrSchedule))
def test_a_schedule_shorter_than_the_run_stays_at_its_last_rate(schedule: LrSchedule) -> None:
    short = rates(20, schedule=schedule, warmup_steps=4, min_lr_ratio=0.1)
    long = rates(40, schedule=schedule, warmup_steps=4, min_lr_ratio=0.1, schedule_steps=20)
    assert long == short + [short[-1]] * 20


def test_a_schedule_longer_than_the_run_is_cut_off() -> None:
    assert rates(10, warmup_steps=2, schedule_steps=40) == rates(40, warmup_steps=2)[:10]

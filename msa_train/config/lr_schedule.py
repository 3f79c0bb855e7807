"""Learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

import math
from dataclasses import dataclass, replace

from msa_train.config import LrSchedule, OptimConfig, RunConfig, Stage, total_steps
from msa_train.config.options import StageSchedule


@dataclass(slots=True, frozen=True)
class LearningRates:
    """Learning rates of one update, on the scale of optim.lr; Muon's follow in proportion."""

    backbone: float
    index: float


def stage_rates(step: int, optim: OptimConfig, stage: Stage, total_steps: int) -> LearningRates:
    """Rates of the update that follows `step` updates: the run's schedule or the stage's own.

    Example: a stage of 4 steps with lr=2, schedule=linear, min_lr_ratio=0.1: 2, 1.4, 0.8, 0.2.
    """
    peak, warm_up = stage.lr or optim.lr, stage.warmup_factor(step)
    rate = _shaped(peak, step, optim, stage, total_steps) * warm_up
    index = _shaped(stage.index_lr or peak, step, optim, stage, total_steps) * warm_up
    if not stage.index_lr:
        index *= optim.index_lr_scale
    return LearningRates(backbone=rate * stage.lr_scale, index=index * stage.index_lr_scale)


def _shaped(peak: float, step: int, optim: OptimConfig, stage: Stage, total_steps: int) -> float:
    """Return a peak rate as it is after `step` updates, without the stage's warm-up."""
    if stage.schedule is StageSchedule.run:
        return learning_rate(step, optim if peak == optim.lr else replace(optim, lr=peak), total_steps)
    if stage.schedule is StageSchedule.constant:
        return peak
    # over the whole stage, from the end of its warm-up on
    begin = stage.first_step + max(stage.warmup_steps - 1, 0)
    share = 1.0 - _fraction(step, begin, stage.last_step - 1)
    if stage.schedule is StageSchedule.cosine:
        share = 0.5 * (1.0 - math.cos(math.pi * share))
    return peak * (stage.min_lr_ratio + (1.0 - stage.min_lr_ratio) * share)


def learning_rate(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Learning rate of one update.

    The warm-up rises linearly and reaches optim.lr at update `warmup_steps - 1`; cosine and wsd reach
    `min_lr_ratio * lr` at the last update of the schedule and stay there.

    Args:
        step: updates made before this one: 0 for the first, total_steps - 1 for the last.
        optim: the schedule.
        total_steps: updates of the whole run, and of the schedule unless optim.schedule_steps is set.

    Example: lr=1, warmup_steps=2, total_steps=5, cosine to 0 -> 0.5, 1, 0.75, 0.25, 0.
    """
    total_steps = optim.schedule_steps or total_steps
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    last, peak = total_steps - 1, max(optim.warmup_steps - 1, 0)
    if optim.schedule is LrSchedule.constant:
        return optim.lr
    if optim.schedule is LrSchedule.wsd:
        start = max(last - round(optim.decay_fraction * total_steps), peak)
        share = 1.0 - _fraction(step, start, last)
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * _fraction(step, peak, last)))
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * share)


def _fraction(step: int, start: int, end: int) -> float:
    """Measure how far step is on the way from start to end, within 0 and 1."""
    if step <= start:
        return 0.0
    return min((step - start) / (end - start), 1.0) if end > start else 1.0


def schedule_steps(config: RunConfig) -> int:
    """Updates over which the learning rate takes its course."""
    return config.optim.schedule_steps or total_steps(config)


def next_lr(config: RunConfig, step: int) -> float:
    return learning_rate(step, config.optim, total_steps(config))

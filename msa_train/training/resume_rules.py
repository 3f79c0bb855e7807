"""What a checkpoint's optimizer and schedule were, against those of the run that goes on from it.

Found before any worker starts, and without loading anything: names stand in the index file as they are.
"""

import mmap
import re
from pathlib import Path
from typing import Any

from msa_train.config import AttentionKind, LrSchedule, RunConfig, total_steps
from msa_train.training.lr_schedule import learning_rate

INDEX_NAME = ".metadata"
"Megatron's list of all tensors; a pickle, of which only the text is looked at"
_MOMENTS = re.compile(rb"optimizer\.state\.exp_avg\.")
_INDEX_MOMENTS = re.compile(rb"optimizer\.state\.exp_avg\.[\w.]*index_branch")
# rates that differ by less are the same but for rounding
_SAME_RATE = 1e-6


def check_index_moments(folder: Path, config: RunConfig) -> None:
    """Refuse to go on where the optimizer has moments for the index branch on one side alone.

    Costs a search through the index file: 0.1 s for one of 50 MB, once.

    Args:
        folder: checkpoint whose optimizer is to be taken over.
        config: the run that goes on.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    if AttentionKind.msa not in config.model.attention_kinds():
        return
    weight, trained = config.attention.kl_weight, _has_index_moments(folder)
    if trained is None or trained == (weight > 0):
        return
    if trained:
        raise ValueError(
            f"attention.kl_weight={weight:g}: the checkpoint in {folder} has trained the index branch, and a "
            "run without its loss has no place for the optimizer's state of it; use "
            "optim.index_lr_scale=0 and a larger attention.kl_weight to freeze it, or another run_dir with "
            "checkpoint.load and checkpoint.load_weights_only=true"
        )
    raise ValueError(
        f"attention.kl_weight={weight:g}: the checkpoint in {folder} was trained with attention.kl_weight=0 "
        "and lacks the optimizer's state of the index branch; use attention.kl_weight=0, or another run_dir "
        "with checkpoint.load and checkpoint.load_weights_only=true"
    )


def _has_index_moments(folder: Path) -> bool | None:
    """None where there is no such file, or none with moments: other checks speak of that."""
    try:
        with (
            (folder / INDEX_NAME).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            return _INDEX_MOMENTS.search(text) is not None if _MOMENTS.search(text) else None
    except (OSError, ValueError):
        return None


def schedule_record(config: RunConfig, step: int) -> dict[str, Any]:
    """What a checkpoint keeps of the schedule: its length, and the learning rate that would come next."""
    return {"steps": schedule_steps(config), "next_lr": _next_lr(config, step)}


def schedule_notes(meta: dict[str, Any], config: RunConfig) -> list[str]:
    """What to tell the user where the learning rate goes on with a step up or down; mostly nothing."""
    recorded, step = meta.get("schedule"), meta["step"]
    if step >= total_steps(config):
        return []
    if not isinstance(recorded, dict):
        # of an earlier version
        rate = f"the learning rate goes on at {_next_lr(config, step):.3g}"
        return [f"the checkpoint of step {step} has no record of its schedule; {rate}, unchecked"]
    before, now = float(recorded["next_lr"]), _next_lr(config, step)
    if abs(before - now) <= _SAME_RATE * max(before, now):
        return []
    length = schedule_steps(config)
    has_changed = length != recorded["steps"]
    setting = "optim.schedule_steps" if config.optim.schedule_steps else "train.steps"
    name = f"{setting}={length}" if has_changed else f"optim.lr={config.optim.lr:g}"
    fix = f"; optim.schedule_steps={recorded['steps']} keeps to that schedule" if has_changed else ""
    return [
        f"{name}: the learning rate goes on at {now:.3g}, that of the checkpoint, over {recorded['steps']} "
        f"steps, would go on at {before:.3g}{fix}"
    ]


def schedule_steps(config: RunConfig) -> int:
    """Updates over which the learning rate takes its course."""
    return config.optim.schedule_steps or total_steps(config)


def train_on_settings(config: RunConfig, steps: int) -> list[str]:
    """Settings with which the same command trains as long again, at the learning rate that it ended with.

    Args:
        config: the run that has ended.
        steps: updates made.
    """
    settings = [f"train.steps={2 * steps}"]
    stages = list(config.stages)
    if stages and config.stages[stages[-1]].tokens:
        settings.append(f"stages.{stages[-1]}.tokens=0")
    optim, length = config.optim, schedule_steps(config)
    # one that is not over yet, or stays at its height, needs nothing
    if optim.schedule is not LrSchedule.constant and optim.warmup_steps < length <= steps:
        settings.append(f"optim.schedule_steps={length}")
        if not optim.min_lr_ratio:
            settings.append("optim.min_lr_ratio=0.1")
    return settings


def _next_lr(config: RunConfig, step: int) -> float:
    return learning_rate(step, config.optim, total_steps(config))

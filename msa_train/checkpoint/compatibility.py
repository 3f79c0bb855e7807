"""Decide whether a run can go on from a checkpoint, and what to tell the user about it."""

import mmap
import re
from dataclasses import fields
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any

import msa_train
from msa_train.checkpoint.manifest import step_of
from msa_train.checkpoint.meta import FORMAT_VERSION
from msa_train.config import (
    AttentionKind,
    ModelConfig,
    RopeType,
    RunConfig,
    StageSchedule,
    plan_stages,
    rope_of_model,
    stage_at,
    total_steps,
)
from msa_train.config.lr_schedule import next_lr, schedule_steps

INDEX_NAME = ".metadata"
"Megatron's list of all tensors; a pickle, of which only the text is searched: nothing is imported or run"
_MOMENTS = re.compile(rb"optimizer\.state\.exp_avg\.")
_INDEX_MOMENTS = re.compile(rb"optimizer\.state\.exp_avg\.[\w.]*index_branch")
# rates that differ by less are the same but for rounding
_SAME_RATE = 1e-6
# meta.json's "content" of a checkpoint without optimizer; absent where there is everything
WEIGHTS_CONTENT = "weights"
# Change neither shapes nor the meaning of the weights: initial scales, names, rates and losses
_NOT_OF_THE_MODEL = {
    "model.name",
    "model.implementation",
    "model.init_std",
    "model.embedding_init_std",
    "model.embedding_shared_std",
    "model.router_bias_update_rate",
    "attention.kl_weight",
    "attention.kl_temperature",
    "attention.kernel",
}
_ROPE_SCALING = tuple(
    f"model.{field.name}"
    for field in fields(ModelConfig)
    if field.name.startswith("rope_") and field.name != "rope_theta"
)
# What a long-context extension changes when it starts from another run's checkpoint
_CHANGED_BY_EXTENSION = {
    "model.rope_theta",
    *_ROPE_SCALING,
    "attention.block_size",
    "attention.topk",
    "attention.local_blocks",
    "attention.window",
    "attention.window_sink",
}
_OF_STAGE = ("theta", "type", "factor", "original_length")
"settings of the rotary embedding that a stage may change"
_ABSENT_ROPE = {"model.rope_type": RopeType.default.value}
"what a checkpoint from before there was scaling means"
# What a new run that takes weights alone may change besides: index branches come and go with their layers
_CHANGED_WITH_WEIGHTS = {"model.layer_attention"}


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
    """Tell whether the optimizer has moments of an index branch; None without file or moments.

    Other checks speak of what is absent.
    """
    try:
        with (
            (folder / INDEX_NAME).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            return _INDEX_MOMENTS.search(text) is not None if _MOMENTS.search(text) else None
    except (OSError, ValueError):
        return None


def schedule_record(config: RunConfig, step: int) -> dict[str, Any]:
    """Return what a checkpoint keeps of the schedule: its length, and the learning rate that would come next.

    Args:
        config: the run that saves.
        step: updates made.
    """
    return {"steps": schedule_steps(config), "next_lr": next_lr(config, step)}


def schedule_notes(meta: dict[str, Any], config: RunConfig) -> list[str]:
    """Tell where the learning rate goes on with a step up or down; mostly nothing.

    The rate is a function of the step alone, so one number, the rate that would have come next, shows any
    change of schedule, warm-up or peak.

    Args:
        meta: meta.json of the checkpoint.
        config: the run that goes on.

    Returns:
        Lines for the user.
    """
    recorded, step = meta.get("schedule"), meta["step"]
    if step >= total_steps(config):
        return []
    stage = stage_at(plan_stages(config), step)
    if stage.lr or stage.schedule is not StageSchedule.run:
        # a rate of the stage's own, which the run's schedule says nothing about
        return []
    if not isinstance(recorded, dict):
        # of an earlier version
        rate = f"the learning rate goes on at {next_lr(config, step):.3g}"
        return [f"the checkpoint of step {step} has no record of its schedule; {rate}, unchecked"]
    before, now = float(recorded["next_lr"]), next_lr(config, step)
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


def check_recorded_stages(meta: dict[str, Any], config: RunConfig) -> None:
    """Refuse to go on if a stage that was trained, in part or whole, is now another one.

    The length of the stage in which the checkpoint lies may change, and so may all later stages.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    step, plan = meta["step"], plan_stages(config)
    # of an earlier version: no stage had a rotary embedding of its own
    unsaid = {"rope": rope_of_model(config.model).record()}
    for index, recorded in enumerate(unsaid | stage for stage in meta.get("stages", [])):
        # The checkpoint's own stage may still get longer or shorter; a stage that is over is history, and so
        # is where the next one began.
        is_over = recorded["first_step"] + recorded["num_steps"] <= step and index + 1 < len(plan)
        planned = plan[index].record() if index < len(plan) else {}
        for key, value in recorded.items():
            if planned.get(key) == value or (key == "num_steps" and not is_over):
                continue
            raise ValueError(
                f"stages: the checkpoint of step {step} in run_dir={config.run_dir} was trained with "
                f"{key}={value} in stage {index + 1} ({recorded['name']}), now it is "
                f"{planned.get(key, 'absent')}; change only stages from that step on, or use another run_dir "
                "with checkpoint.load"
            )


def fingerprint(config: RunConfig) -> dict[str, object]:
    """Collect the fields that decide shapes and meaning of the weights; plain JSON.

    Example: {"model.num_heads": 4, "model.layer_attention": "full*1,msa*2", "attention.window": None, ...}.
    """
    result: dict[str, object] = {}
    for section, part in (("model", config.model), ("attention", config.attention)):
        for field in fields(part):
            value = getattr(part, field.name)
            result[f"{section}.{field.name}"] = value.value if isinstance(value, Enum) else value
    if AttentionKind.swa not in config.model.attention_kinds():
        # a window that no layer has may change
        result |= {"attention.window": None, "attention.window_sink": None}
    # Run lengths, so that "full,msa" over 3 layers and "full*1,msa*2" are the same model.
    kinds = [(kind.value, len(list(run))) for kind, run in groupby(config.model.attention_kinds())]
    result["model.layer_attention"] = ",".join(f"{kind}*{count}" for kind, count in kinds)
    return {key: value for key, value in result.items() if key not in _NOT_OF_THE_MODEL}


def last_rope(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotary embedding, by name, that a checkpoint's last stage had.

    Example: a stage extended the model: {"rope_theta": 5e6, "rope_type": "yarn", "rope_factor": 4.0, ...}.
    Empty where an earlier version wrote it, or it holds weights alone: the fingerprint says all.
    """
    stages = meta.get("stages") or [{}]
    rope = stages[-1].get("rope", {})
    return {f"rope_{name}": rope[name] for name in _OF_STAGE if name in rope}


def changed_by_stages(meta: dict[str, Any]) -> dict[str, Any]:
    """Return what of the fingerprint the last stage had otherwise: rotary embedding and top-k, by key."""
    changed: dict[str, Any] = {f"model.{name}": value for name, value in last_rope(meta).items()}
    topk = (meta.get("stages") or [{}])[-1].get("topk")
    return changed if topk is None else {**changed, "attention.topk": topk}


def takes_weights_only(meta: dict[str, Any], config: RunConfig) -> bool:
    """Tell whether only the model is taken from another run's checkpoint, as asked or as all there is."""
    return config.checkpoint.load_weights_only or meta.get("content") == WEIGHTS_CONTENT


def check_usable(meta: dict[str, Any], folder: Path, config: RunConfig, *, own: bool) -> list[str]:
    """Refuse newer formats and other models.

    Args:
        meta: meta.json of the checkpoint.
        folder: the checkpoint.
        config: the run that goes on from it.
        own: it is in the run's own run_dir, so all of it must fit; from another run, extensions may change.

    Returns:
        Lines that the user should know.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    setting, fix = setting_and_fix(config, own=own)
    if meta["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{setting}: checkpoint {short_name(folder)} has format {meta['format_version']}, written by "
            f"msa-train {meta.get('msa_train_version', 'unknown')}; this is {msa_train.__version__} and "
            f"knows formats up to {FORMAT_VERSION}; upgrade msa-train, or use {fix}"
        )
    ours, theirs, notes = fingerprint(config), _ABSENT_ROPE | meta["fingerprint"], []
    if not own:
        # stages may have changed it on the way
        theirs |= changed_by_stages(meta)
    may_change = set() if own else set(_CHANGED_BY_EXTENSION)
    if not own and takes_weights_only(meta, config):
        may_change |= _CHANGED_WITH_WEIGHTS
        # no index branch there, so its size was a setting without effect
        if AttentionKind.msa.value not in str(theirs.get("model.layer_attention")):
            may_change.add("attention.index_head_dim")
    for key in dict.fromkeys([*ours, *theirs]):
        # a field that is younger than the checkpoint had no say in it
        if key not in theirs or ours.get(key) == theirs[key]:
            continue
        if key not in ours:
            raise ValueError(
                f"{setting}: checkpoint {short_name(folder)} has {key}={theirs[key]}, which msa-train "
                f"{msa_train.__version__} does not know; upgrade msa-train, or use {fix}"
            )
        if key not in may_change:
            raise ValueError(
                f"{key}={ours[key]}: checkpoint {folder} is of another model, with {key}={theirs[key]}; "
                f"set {key}={theirs[key]}, or use {fix}"
            )
        notes.append(f"{key}={ours[key]}: the checkpoint was trained with {theirs[key]}")
    _check_optimizer(meta, folder, config, own=own)
    _check_data_position(meta, folder, config, own=own)
    if own:
        check_recorded_stages(meta, config)
    # both matter only to a run that goes on with optimizer and schedule
    if own or not takes_weights_only(meta, config):
        check_index_moments(folder, config)
        notes += schedule_notes(meta, config)
    return notes


def _check_optimizer(meta: dict[str, Any], folder: Path, config: RunConfig, *, own: bool) -> None:
    """Refuse the state of another algorithm: the moments of one mean nothing to another."""
    ours, theirs = config.optim.algorithm.value, meta.get("optimizer")
    if theirs in (None, ours) or (not own and takes_weights_only(meta, config)):
        return
    raise ValueError(
        f"optim.algorithm={ours}: checkpoint {short_name(folder)} has the state of {theirs}; use "
        f"optim.algorithm={theirs}, or another run_dir with checkpoint.load={config.run_dir} and "
        "checkpoint.load_weights_only=true"
    )


def _check_data_position(meta: dict[str, Any], folder: Path, config: RunConfig, *, own: bool) -> None:
    """Refuse another batch size: the next pack is found from the step, so packs would repeat or be lost.

    Example: 100 steps of 8 packs used packs 0 to 799; with 4 per step, step 101 would begin at pack 400.
    """
    batch, consumed, step = config.train.global_batch_size, meta["consumed_samples"], meta["step"]
    planned = planned_samples(config, step)
    if own and step and consumed != planned and config.stages:
        raise ValueError(
            f"stages: checkpoint {short_name(folder)} has used {consumed} packs, and the stages as they are "
            f"now {planned}; use the batch sizes that it was trained with up to step {step}, or another "
            f"run_dir with checkpoint.load={config.run_dir} and checkpoint.accept_other_data=true"
        )
    if own and consumed != planned:
        raise ValueError(
            f"train.global_batch_size={batch}: checkpoint {short_name(folder)} has used {consumed} packs, "
            f"{consumed / step:g} per step, and one run counts its packs by one size, also with "
            "checkpoint.accept_other_data; use "
            f"train.global_batch_size={consumed / step:g}, or another run_dir with "
            f"checkpoint.load={config.run_dir} and checkpoint.accept_other_data=true"
        )


def planned_samples(config: RunConfig, step: int) -> int:
    """Return the packs that a run as it is configured uses in its first `step` steps."""
    return stage_at(plan_stages(config), max(step - 1, 0)).samples_at(step)


def setting_and_fix(config: RunConfig, *, own: bool) -> tuple[str, str]:
    """Name the setting that led to a checkpoint, and what to use instead, for messages."""
    if own:
        return f"run_dir={config.run_dir}", "another run_dir"
    return f"checkpoint.load={config.checkpoint.load}", "another checkpoint.load"


def short_name(folder: Path) -> str:
    """Shorten a folder's name for messages: step_00000200 -> step_200; other names as they are."""
    step = step_of(folder)
    return folder.name if step is None else f"step_{step}"

"""Check rules about stages. Each failure is one ValueError line: the value, the rule, the fix."""

from operator import attrgetter

from msa_train.config.options import AttentionKind, KlTarget, StageAttention, StageRecompute, StageSchedule
from msa_train.config.run import RunConfig
from msa_train.config.stage_plan import plan_stages
from msa_train.config.stages import StageConfig
from msa_train.config.staging.stage import Stage
from msa_train.config.staging.views import has_layouts

_NOT_NEGATIVE = (
    *("tokens", "seq_len", "warmup_steps", "lr_scale", "index_lr_scale", "topk", "lr", "index_lr"),
    *("global_batch_size", "batch_tokens"),
    *("alternate.every", "alternate.seq_len", "alternate.global_batch_size"),
    *(f"parallel.{key}" for key in ("cp_size", "cp_head_size", "ep_size", "tp_size", "pp_size")),
)


def check_stages(config: RunConfig) -> None:
    """Check what is written and that every stage trains something.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    for name, stage in config.stages.items():
        if not name.isidentifier():
            raise ValueError(f"stages.{name}: must be a name of letters, digits and _, such as stages.sparse")
        _check_numbers(f"stages.{name}", stage)
        _check_rates(f"stages.{name}", stage)
        _check_batch(f"stages.{name}", stage, config)
        _check_alternate(f"stages.{name}", stage, config)
        if stage.recompute is not StageRecompute.run and config.train.recompute_stages:
            raise ValueError(
                f"stages.{name}.recompute={stage.recompute.value}: train.recompute_stages="
                f"{config.train.recompute_stages} says it for each pipeline rank; leave one out"
            )
    for stage in plan_stages(config):
        if config.stages:
            _check_target(stage)
            _check_trains(stage, config)
    if has_layouts(config) and not config.checkpoint.every:
        raise ValueError(
            "checkpoint.every=0: stages of several layouts go from one to the next by a checkpoint; use e.g. "
            "checkpoint.every=100, or one layout for all stages"
        )


def _check_numbers(place: str, stage: StageConfig) -> None:
    for key in _NOT_NEGATIVE:
        value = attrgetter(key)(stage)
        if value < 0:
            raise ValueError(f"{place}.{key}={value}: must not be negative")


def _check_rates(place: str, stage: StageConfig) -> None:
    ratio = stage.min_lr_ratio
    if ratio != -1 and not 0 <= ratio <= 1:
        raise ValueError(f"{place}.min_lr_ratio={ratio:g}: must be from 0 to 1, or -1: optim.min_lr_ratio")
    if ratio != -1 and stage.schedule not in (StageSchedule.linear, StageSchedule.cosine):
        raise ValueError(
            f"{place}.min_lr_ratio={ratio:g}: has no effect with {place}.schedule={stage.schedule.value}; "
            f"use {place}.schedule=linear or cosine, or leave it out"
        )


def _check_batch(place: str, stage: StageConfig, config: RunConfig) -> None:
    if not stage.batch_tokens:
        return
    seq_len = stage.seq_len or config.data.seq_len
    if stage.global_batch_size:
        raise ValueError(
            f"{place}.batch_tokens={stage.batch_tokens}: says the same as {place}.global_batch_size="
            f"{stage.global_batch_size}; leave one out"
        )
    if stage.batch_tokens % max(seq_len, 1):
        packs = max(round(stage.batch_tokens / seq_len), 1)
        raise ValueError(
            f"{place}.batch_tokens={stage.batch_tokens}: must be a multiple of the {seq_len} tokens of a "
            f"pack; use {place}.batch_tokens={packs * seq_len}"
        )


def _check_alternate(place: str, stage: StageConfig, config: RunConfig) -> None:
    """Check steps with shorter packs; that these fit the layout is checked as for any length."""
    short, seq_len = stage.alternate, stage.seq_len or config.data.seq_len
    if not short.every:
        if short.seq_len or short.global_batch_size:
            raise ValueError(
                f"{place}.alternate.every=0: no step has the shorter packs that {place}.alternate describes; "
                f"use e.g. {place}.alternate.every=10, or leave the rest out"
            )
        return
    if short.every < 2:
        raise ValueError(
            f"{place}.alternate.every={short.every}: must be at least 2, or all steps would have the shorter "
            f"packs; use {place}.seq_len={short.seq_len} for that"
        )
    if not 0 < short.seq_len < seq_len:
        raise ValueError(
            f"{place}.alternate.seq_len={short.seq_len}: must be shorter than the {seq_len} tokens of the "
            f"other steps' packs; use e.g. {place}.alternate.seq_len={max(seq_len // 4, 1)}"
        )
    if not short.global_batch_size:
        batch = stage.global_batch_size or stage.batch_tokens // seq_len or config.train.global_batch_size
        if batch * seq_len % short.seq_len:
            raise ValueError(
                f"{place}.alternate.seq_len={short.seq_len}: must divide the {batch * seq_len} tokens of the "
                f"other steps; use a divisor, or {place}.alternate.global_batch_size"
            )


def _check_target(stage: Stage) -> None:
    """Check that the KL loss looks at tokens that the main branch attends to, whose probabilities it has."""
    if stage.attention is StageAttention.dense and stage.kl is KlTarget.selected:
        raise ValueError(
            f"stages.{stage.name}.kl=selected: with attention=dense nothing is selected; "
            f"use stages.{stage.name}.kl=causal or attention=sparse"
        )
    if stage.attention is StageAttention.sparse and stage.kl is KlTarget.causal:
        raise ValueError(
            f"stages.{stage.name}.kl=causal: with attention=sparse only selected tokens are seen; "
            f"use stages.{stage.name}.kl=selected or attention=dense"
        )


def _check_trains(stage: Stage, config: RunConfig) -> None:
    index_scale = stage.index_lr_scale * (1.0 if stage.index_lr else config.optim.index_lr_scale)
    has_index = AttentionKind.msa in config.model.attention_kinds()
    index_trains = has_index and index_scale > 0 and stage.kl is not KlTarget.none
    if stage.lr_scale == 0 and not index_trains:
        raise ValueError(
            f"stages.{stage.name}.lr_scale=0: freezes the backbone, and the index branch does not train "
            "either (its learning rate or KL loss is 0, or no layer is msa); "
            f"use stages.{stage.name}.lr_scale=1 or train the index branch"
        )

"""Plan the stages of a run: the steps, packs and tokens of each."""

from collections.abc import Sequence
from dataclasses import dataclass

from msa_train.config.options import KlTarget, StageAttention
from msa_train.config.rope.settings import rope_of_stage
from msa_train.config.run import RunConfig
from msa_train.config.stages import StageConfig
from msa_train.config.staging.stage import Alternate, Stage


def plan_stages(config: RunConfig) -> tuple[Stage, ...]:
    """Plan the stages with their steps, cut off at train.steps.

    A stage with the packs' length of the one before goes on where that stopped in the data; with another
    length it packs anew what is left of the documents, see `data/carried`.

    Example: dense_warmup of 100 tokens and sparse of 0 tokens, packs of 32, one per step, train.steps=10 ->
    4 steps of dense_warmup, 6 of sparse.

    Raises:
        ValueError: if the stages do not fit together or do not reach train.steps.
    """
    written = config.stages or {"main": StageConfig()}
    limit = config.train.steps
    stages: list[Stage] = []
    for index, (name, stage) in enumerate(written.items()):
        first_step = stages[-1].last_step if stages else 0
        sizes = step_sizes(config, stage)
        if stage.tokens:
            num_steps = _steps_of(stage.tokens, sizes)
        elif index == len(written) - 1:
            num_steps = limit - first_step
        else:
            raise ValueError(
                f"stages.{name}.tokens=0: only the last stage may go on to train.steps; give its length"
            )
        if num_steps < 1:
            raise ValueError(
                f"train.steps={limit}: leaves no end to stage {name}, which begins after {first_step} steps; "
                f"use train.steps={first_step + 1} or more, or stages.{name}.tokens"
            )
        before = stages[-1] if stages else None
        goes_on = before is not None and _same_packs(config, before, stage, sizes)
        stages.append(
            Stage(
                index=index,
                name=name,
                first_step=first_step,
                num_steps=num_steps,
                seq_len=sizes.seq_len,
                global_batch_size=sizes.global_batch_size,
                first_token=before.tokens_at(first_step) if before else 0,
                first_sample=before.samples_at(first_step) if before else 0,
                stream=before.stream if before and goes_on else index,
                first_pack=before.pack_at(first_step) if before and goes_on else 0,
                alternate=sizes.alternate,
                topk=stage.topk or config.attention.topk,
                attention=stage.attention,
                kl=_resolve(stage, config),
                lr_scale=stage.lr_scale,
                index_lr_scale=stage.index_lr_scale,
                lr=stage.lr,
                index_lr=stage.index_lr,
                schedule=stage.schedule,
                min_lr_ratio=config.optim.min_lr_ratio if stage.min_lr_ratio < 0 else stage.min_lr_ratio,
                warmup_steps=stage.warmup_steps,
                rope=rope_of_stage(config.model, stage),
            )
        )
        # stages behind the last step are not planned; this one keeps its whole length
        if limit and stages[-1].last_step >= limit:
            return tuple(stages)
    if limit:
        last = stages[-1]
        raise ValueError(
            f"train.steps={limit}: the stages end after {last.last_step} steps; use train.steps=0 for all of "
            f"them, or stages.{last.name}.tokens=0 for a last stage that goes on"
        )
    return tuple(stages)


@dataclass(slots=True, frozen=True)
class StepSizes:
    """Hold what the steps of a stage are made of."""

    seq_len: int
    "tokens of a pack"
    global_batch_size: int
    "packs of a step"
    alternate: Alternate
    "steps with shorter packs"


def step_sizes(config: RunConfig, stage: StageConfig) -> StepSizes:
    """Work out packs and tokens of a step; at least one of each, whatever is written."""
    seq_len = max(stage.seq_len or config.data.seq_len, 1)
    batch = stage.global_batch_size or stage.batch_tokens // seq_len or config.train.global_batch_size
    short, alternate = stage.alternate, Alternate()
    if short.every > 0 and short.seq_len > 0:
        packs = short.global_batch_size or max(batch * seq_len // short.seq_len, 1)
        alternate = Alternate(every=short.every, seq_len=short.seq_len, global_batch_size=packs)
    return StepSizes(seq_len, max(batch, 1), alternate)


def _steps_of(tokens: int, sizes: StepSizes) -> int:
    """Return the fewest whole steps with at least as many tokens.

    Example: 100 tokens in steps of one pack of 32 are 4 steps. With 64 tokens in every 2nd step, 100 tokens
    are 3 steps: 32, 64 and 32.
    """
    usual, short = sizes.global_batch_size * sizes.seq_len, sizes.alternate
    if not short.every:
        return -(-tokens // usual)
    cycle = (short.every - 1) * usual + short.global_batch_size * short.seq_len
    cycles, left = divmod(tokens, cycle)
    return cycles * short.every + min(-(-left // usual), short.every)


def _same_packs(config: RunConfig, before: Stage, stage: StageConfig, sizes: StepSizes) -> bool:
    """Tell whether a stage goes on in the packs of the one before it."""
    if before.alternate.every or sizes.alternate.every:
        return False
    return before.seq_len == sizes.seq_len


def total_steps(config: RunConfig) -> int:
    """Return the updates of the whole run: train.steps or, if that is 0, all stages."""
    return config.train.steps or plan_stages(config)[-1].last_step


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage of the update that follows `step` updates; the last one from its end on."""
    return next((stage for stage in stages if step < stage.last_step), stages[-1])


def rope_note(stage: Stage, stages: Sequence[Stage]) -> str:
    """Write ", RoPE ..." where not all stages of a run have the same rotary embedding; else nothing."""
    return f", RoPE {stage.rope}" if any(one.rope != stage.rope for one in stages) else ""


def longest_seq_len(config: RunConfig) -> int:
    """Return the tokens of the longest pack of any stage."""
    return max(max(stage.seq_len, stage.alternate.seq_len) for stage in plan_stages(config))


def pack_lengths(config: RunConfig) -> list[int]:
    """List the tokens of the packs of all stages, each length once, those of alternate steps included."""
    lengths = [length for stage in plan_stages(config) for length in (stage.seq_len, stage.alternate.seq_len)]
    return [length for length in dict.fromkeys(lengths) if length]


def _resolve(stage: StageConfig, config: RunConfig) -> KlTarget:
    """Resolve the KL target `auto`; none where its weight is 0."""
    if config.attention.kl_weight == 0:
        return KlTarget.none
    if stage.kl is not KlTarget.auto:
        return stage.kl
    return KlTarget.causal if stage.attention is StageAttention.dense else KlTarget.selected

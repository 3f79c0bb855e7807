"""Plan the stages of a run: the steps, packs and tokens of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msa_train.config.options import KlTarget, StageAttention
from msa_train.config.rope.settings import Rope, rope_of_stage
from msa_train.config.run import RunConfig
from msa_train.config.stages import StageConfig


@dataclass(kw_only=True, slots=True, frozen=True)
class Stage:
    """Hold one stage of a plan."""

    index: int
    "number of the stage, from 0 on"
    name: str
    "its key in the configuration"
    first_step: int
    "updates made before it"
    num_steps: int
    "updates of the stage"
    seq_len: int
    "tokens of its packs"
    first_token: int
    "tokens of the run before it, padding included"
    first_pack: int
    "number of its first pack, among packs of its own seq_len"
    attention: StageAttention
    "of the main branch of MSA layers"
    kl: KlTarget
    "tokens of the KL loss; never auto"
    lr_scale: float
    "factor on the learning rates of the backbone; 0 freezes it"
    index_lr_scale: float
    "factor on the learning rates of the index branch"
    warmup_steps: int
    "first updates over which the learning rates rise from 0"
    rope: Rope
    "rotary embedding of main attention and index branch"

    @property
    def last_step(self) -> int:
        """Return the updates made when it is over."""
        return self.first_step + self.num_steps

    def tokens_at(self, step: int, global_batch_size: int) -> int:
        """Return the tokens of the run after `step` updates, padding included.

        Example: a stage from step 4 on with 128 tokens before it, packs of 64, one per step: after 10 steps
        512.
        """
        return self.first_token + (step - self.first_step) * global_batch_size * self.seq_len

    def pack_at(self, step: int, global_batch_size: int) -> int:
        """Return the number of the first pack of the update that follows `step` updates.

        Example: a stage from step 4 and pack 2 on, one pack per step: pack 3 after 5 updates.
        """
        return self.first_pack + (step - self.first_step) * global_batch_size

    def warmup_factor(self, step: int) -> float:
        """Return the factor on the learning rates of the update that follows `step` updates.

        Example: warmup_steps 2 in a stage from step 0 on: 0.5, 1, 1.
        """
        return min(1.0, (step - self.first_step + 1) / max(self.warmup_steps, 1))

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it; plain JSON."""
        return {
            "name": self.name,
            "first_step": self.first_step,
            "num_steps": self.num_steps,
            "seq_len": self.seq_len,
            "attention": self.attention.value,
            "rope": self.rope.record(),
        }


def plan_stages(config: RunConfig) -> tuple[Stage, ...]:
    """Plan the stages with their steps, cut off at train.steps.

    A stage with the packs' length of the one before goes on where that stopped in the data; with another
    length it starts at the pack that holds as many tokens before it as the run has seen.

    Example: dense_warmup of 100 tokens and sparse of 0 tokens, packs of 32, one per step, train.steps=10 ->
    4 steps of dense_warmup, 6 of sparse. Were the packs of sparse 64 tokens long, it would begin at its pack
    2, as 128 tokens lie before it.

    Raises:
        ValueError: if the stages do not fit together or do not reach train.steps.
    """
    written = config.stages or {"main": StageConfig()}
    batch, limit = config.train.global_batch_size, config.train.steps
    stages: list[Stage] = []
    for index, (name, stage) in enumerate(written.items()):
        first_step = stages[-1].last_step if stages else 0
        seq_len = stage.seq_len or config.data.seq_len
        if stage.tokens:
            # whole steps: 100 tokens in steps of one pack of 32 are 4 steps
            num_steps = -(-stage.tokens // (batch * seq_len))
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
        first_token = stages[-1].tokens_at(first_step, batch) if stages else 0
        same_length = bool(stages) and stages[-1].seq_len == seq_len
        # packs of another length are other packs: begin at the first whole one behind the tokens seen
        first_pack = stages[-1].pack_at(first_step, batch) if same_length else -(-first_token // seq_len)
        stages.append(
            Stage(
                index=index,
                name=name,
                first_step=first_step,
                num_steps=num_steps,
                seq_len=seq_len,
                first_token=first_token,
                first_pack=first_pack,
                attention=stage.attention,
                kl=_resolve(stage, config),
                lr_scale=stage.lr_scale,
                index_lr_scale=stage.index_lr_scale,
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
    return max(stage.seq_len for stage in plan_stages(config))


def _resolve(stage: StageConfig, config: RunConfig) -> KlTarget:
    """Resolve the KL target `auto`; none where its weight is 0."""
    if config.attention.kl_weight == 0:
        return KlTarget.none
    if stage.kl is not KlTarget.auto:
        return stage.kl
    return KlTarget.causal if stage.attention is StageAttention.dense else KlTarget.selected

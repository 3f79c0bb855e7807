"""Plan of a run: which stage each step belongs to, with what length and loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msa_train.config.options import KlTarget, StageAttention
from msa_train.config.run import RunConfig
from msa_train.config.stages import StageConfig


@dataclass(kw_only=True, slots=True, frozen=True)
class Stage:
    """One stage of a plan.

    first_step: updates made before it. first_token: tokens before it, padding included. first_pack: number of
    its first pack, among packs of its own seq_len.
    """

    index: int
    name: str
    first_step: int
    num_steps: int
    seq_len: int
    first_token: int
    first_pack: int
    attention: StageAttention
    kl: KlTarget
    lr_scale: float
    index_lr_scale: float
    warmup_steps: int

    @property
    def last_step(self) -> int:
        """Updates made when it is over."""
        return self.first_step + self.num_steps

    def tokens_at(self, step: int, global_batch_size: int) -> int:
        """Tokens of the run after `step` updates, padding included."""
        return self.first_token + (step - self.first_step) * global_batch_size * self.seq_len

    def pack_at(self, step: int, global_batch_size: int) -> int:
        """Number of the first pack of the update that follows `step` updates."""
        return self.first_pack + (step - self.first_step) * global_batch_size

    def warmup_factor(self, step: int) -> float:
        """Factor on the learning rates of the update that follows `step` updates."""
        return min(1.0, (step - self.first_step + 1) / max(self.warmup_steps, 1))

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; plain JSON."""
        return {
            "name": self.name,
            "first_step": self.first_step,
            "num_steps": self.num_steps,
            "seq_len": self.seq_len,
            "attention": self.attention.value,
        }


def plan_stages(config: RunConfig) -> tuple[Stage, ...]:
    """Stages with their steps, cut off at train.steps.

    A stage with the packs' length of the one before goes on where that stopped in the data; with another
    length it starts at the pack that holds as many tokens before it as the run has seen.

    Example: dense_warmup of 100 tokens and sparse of 0 tokens, packs of 32, one per step, train.steps=10 ->
    4 steps of dense_warmup, 6 of sparse.

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
            )
        )
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
    """Updates of the whole run: train.steps or, if that is 0, all stages."""
    return config.train.steps or plan_stages(config)[-1].last_step


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of the update that follows `step` updates; the last one from its end on."""
    return next((stage for stage in stages if step < stage.last_step), stages[-1])


def longest_seq_len(config: RunConfig) -> int:
    """Tokens of the longest pack of any stage."""
    return max(stage.seq_len for stage in plan_stages(config))


def _resolve(stage: StageConfig, config: RunConfig) -> KlTarget:
    """The KL target without `auto`; none where its weight is 0."""
    if config.attention.kl_weight == 0:
        return KlTarget.none
    if stage.kl is not KlTarget.auto:
        return stage.kl
    return KlTarget.causal if stage.attention is StageAttention.dense else KlTarget.selected

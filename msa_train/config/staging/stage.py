"""Hold one stage of a plan: which steps, which packs, which learning rates."""

from dataclasses import dataclass
from typing import Any

from msa_train.config.options import KlTarget, StageAttention, StageSchedule
from msa_train.config.rope.settings import Rope


@dataclass(kw_only=True, slots=True, frozen=True)
class Alternate:
    """Hold the steps of a stage that have shorter packs: the n-th, 2n-th, ... of it."""

    every: int = 0
    "n; 0: none"
    seq_len: int = 0
    "tokens of their packs"
    global_batch_size: int = 0
    "packs of each of these steps"

    def steps_before(self, steps: int) -> int:
        """Count them among the first `steps` of the stage; every 3: of 7 steps two, the 3rd and 6th."""
        return steps // self.every if self.every else 0


@dataclass(kw_only=True, slots=True, frozen=True)
class Stage:
    """Hold one stage of a plan. A step is named by the updates before it, the first of the run is 0."""

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
    global_batch_size: int
    "packs of a step"
    first_token: int
    "tokens of the run before it, padding included"
    first_sample: int
    "packs of the run before it, of any length"
    stream: int
    "index of the first stage of those in a row that go on in the same packs"
    first_pack: int
    "number of its first pack among those of its stream"
    alternate: Alternate
    "steps with shorter packs"
    topk: int
    "blocks that a query selects"
    attention: StageAttention
    "of the main branch of MSA layers"
    kl: KlTarget
    "tokens of the KL loss; never auto"
    lr_scale: float
    "factor on the learning rates of the backbone; 0 freezes it"
    index_lr_scale: float
    "factor on the learning rates of the index branch"
    lr: float
    "peak rate of the backbone; 0: optim.lr"
    index_lr: float
    "peak rate of the index branch; 0: that of the backbone * optim.index_lr_scale"
    schedule: StageSchedule
    "shape of the rates"
    min_lr_ratio: float
    "where that is linear or cosine: the last rate as a share of the peak"
    warmup_steps: int
    "first updates over which the learning rates rise from 0"
    rope: Rope
    "rotary embedding of main attention and index branch"

    @property
    def last_step(self) -> int:
        """Return the updates made when it is over."""
        return self.first_step + self.num_steps

    def is_alternate(self, step: int) -> bool:
        """Tell whether the update that follows `step` updates has shorter packs."""
        every = self.alternate.every
        return every > 0 and (step - self.first_step + 1) % every == 0

    def seq_len_at(self, step: int) -> int:
        """Return the tokens of a pack of the update that follows `step` updates."""
        return self.alternate.seq_len if self.is_alternate(step) else self.seq_len

    def batch_at(self, step: int) -> int:
        """Return the packs of the update that follows `step` updates."""
        return self.alternate.global_batch_size if self.is_alternate(step) else self.global_batch_size

    def packs_before(self, step: int) -> tuple[int, int]:
        """Count the packs of the stage's first updates, up to `step` of the run: usual ones, shorter ones.

        Example: a stage from step 4 on, 2 packs per step and 8 shorter ones in every 3rd: at step 8 it has
        used 6 and 8.
        """
        steps = step - self.first_step
        short = self.alternate.steps_before(steps)
        return (steps - short) * self.global_batch_size, short * self.alternate.global_batch_size

    def tokens_at(self, step: int) -> int:
        """Return the tokens of the run after `step` updates, padding included.

        Example: a stage from step 4 on with 128 tokens before it, packs of 64, one per step: after 10 steps
        512.
        """
        usual, short = self.packs_before(step)
        return self.first_token + usual * self.seq_len + short * self.alternate.seq_len

    def samples_at(self, step: int) -> int:
        """Return the packs of the run after `step` updates, whatever their lengths."""
        return self.first_sample + sum(self.packs_before(step))

    def pack_at(self, step: int) -> int:
        """Return the number of the first pack of the update that follows `step` updates.

        It counts packs of the stage's stream or, where the update has shorter ones, those of the stage.

        Example: a stage from step 4 and pack 2 on, one pack per step: pack 3 after 5 updates.
        """
        usual, short = self.packs_before(step)
        return short if self.is_alternate(step) else self.first_pack + usual

    def warmup_factor(self, step: int) -> float:
        """Return the factor on the learning rates of the update that follows `step` updates.

        Example: warmup_steps 2 in a stage from step 0 on: 0.5, 1, 1.
        """
        return min(1.0, (step - self.first_step + 1) / max(self.warmup_steps, 1))

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it; plain JSON."""
        alternate = self.alternate
        return {
            "name": self.name,
            "first_step": self.first_step,
            "num_steps": self.num_steps,
            "seq_len": self.seq_len,
            "global_batch_size": self.global_batch_size,
            "alternate": [alternate.every, alternate.seq_len, alternate.global_batch_size],
            "topk": self.topk,
            "attention": self.attention.value,
            "rope": self.rope.record(),
        }

"""Word what a stage is, for the terminal: what differs among the stages of a run, and nothing else."""

from collections.abc import Sequence

from msa_train.config.stage_plan import rope_note
from msa_train.config.staging.stage import Stage


def stage_note(stage: Stage, stages: Sequence[Stage], step: int, total_steps: int) -> str:
    """Write one line about a stage that goes on after `step` updates.

    Example: "stage long: steps 11 to 20, 4096 tokens per sequence, attention sparse, KL selected, topk 8".
    """
    line = (
        f"stage {stage.name}: steps {step + 1} to {min(stage.last_step, total_steps)}, {stage.seq_len} "
        f"tokens per sequence, attention {stage.attention.value}, KL {stage.kl.value}"
        f"{rope_note(stage, stages)}"
    )
    if any(one.topk != stage.topk for one in stages):
        line += f", topk {stage.topk}"
    if any(one.global_batch_size != stage.global_batch_size for one in stages):
        line += f", {stage.global_batch_size} sequences per step"
    short = stage.alternate
    if short.every:
        line += f"; every {short.every}th step {short.global_batch_size} of {short.seq_len} tokens"
    return line

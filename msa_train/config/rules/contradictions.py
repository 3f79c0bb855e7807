"""Find settings that are allowed and do not do what they seem to say: one line each, before a run starts."""

from msa_train.config.deepspeed.settings import DeepSpeedConfig
from msa_train.config.options import BadStep, EngineKind
from msa_train.config.run import RunConfig
from msa_train.config.stage_plan import plan_stages, total_steps


def contradictions(config: RunConfig) -> list[str]:
    """List what a user should know about settings that cancel one another: `name=value: consequence; fix`."""
    return [*_warm_ups(config), *_without_effect(config)]


def _warm_ups(config: RunConfig) -> list[str]:
    steps, warm_up = total_steps(config), config.optim.warmup_steps
    found: list[str] = []
    if warm_up > steps > 0:
        found.append(
            f"optim.warmup_steps={warm_up}: the run ends after {steps} steps, before the learning rate has "
            f"reached optim.lr={config.optim.lr:g}; use optim.warmup_steps={steps // 10}, or more steps"
        )
    # the last stage that is reached may be cut off by train.steps
    left = steps
    for stage in plan_stages(config):
        length = min(stage.num_steps, left)
        left -= length
        if stage.warmup_steps > length > 0 and config.stages:
            found.append(
                f"stages.{stage.name}.warmup_steps={stage.warmup_steps}: the stage ends after {length} steps,"
                f" before its learning rates have risen; use stages.{stage.name}.warmup_steps={length // 10}"
            )
    return found


def _without_effect(config: RunConfig) -> list[str]:
    checkpoint, train = config.checkpoint, config.train
    found: list[str] = []
    if config.engine is not EngineKind.deepspeed and config.deepspeed != DeepSpeedConfig():
        found.append(
            f"engine={config.engine.value}: does not look at deepspeed.*, which is set; use "
            "engine=deepspeed, or leave that out"
        )
    if config.logging.every > total_steps(config):
        found.append(
            f"logging.every={config.logging.every}: no step is shown or written to metrics.jsonl, as the run "
            f"ends after {total_steps(config)}; use logging.every=1"
        )
    if checkpoint.load_weights_only and not checkpoint.load:
        found.append(
            "checkpoint.load_weights_only=true: has no effect without checkpoint.load; set checkpoint.load, "
            "or leave it out"
        )
    if checkpoint.keep_every and not checkpoint.keep_last:
        found.append(
            f"checkpoint.keep_every={checkpoint.keep_every}: has no effect, as checkpoint.keep_last=0 keeps "
            "all; use checkpoint.keep_last=2"
        )
    if train.bad_step is BadStep.rollback and checkpoint.every > total_steps(config):
        found.append(
            "train.bad_step=rollback: there is nothing to go back to, as checkpoint.every="
            f"{checkpoint.every} is more than the {total_steps(config)} steps of the run; lower that"
        )
    return found

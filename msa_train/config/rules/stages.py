"""Check rules about stages. Each failure is one ValueError line: the value, the rule, the fix."""

from msa_train.config.options import AttentionKind, KlTarget, StageAttention
from msa_train.config.run import RunConfig
from msa_train.config.stage_plan import Stage, plan_stages


def check_stages(config: RunConfig) -> None:
    """Check what is written and that every stage trains something.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    for name, stage in config.stages.items():
        if not name.isidentifier():
            raise ValueError(f"stages.{name}: must be a name of letters, digits and _, such as stages.sparse")
        for key in ("tokens", "seq_len", "warmup_steps", "lr_scale", "index_lr_scale"):
            if getattr(stage, key) < 0:
                raise ValueError(f"stages.{name}.{key}={getattr(stage, key)}: must not be negative")
    for stage in plan_stages(config):
        if config.stages:
            _check_target(stage)
            _check_trains(stage, config)


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
    index_scale = stage.index_lr_scale * config.optim.index_lr_scale
    has_index = AttentionKind.msa in config.model.attention_kinds()
    index_trains = has_index and index_scale > 0 and stage.kl is not KlTarget.none
    if stage.lr_scale == 0 and not index_trains:
        raise ValueError(
            f"stages.{stage.name}.lr_scale=0: freezes the backbone, and the index branch does not train "
            "either (its learning rate or KL loss is 0, or no layer is msa); "
            f"use stages.{stage.name}.lr_scale=1 or train the index branch"
        )

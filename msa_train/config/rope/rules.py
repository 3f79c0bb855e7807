"""Check settings of the rotary embedding. Each failure is one ValueError line: value, rule, fix."""

from msa_train.config.model import ModelConfig
from msa_train.config.options import RopeType
from msa_train.config.rope.settings import Rope, rope_of_model, rope_of_stage
from msa_train.config.run import RunConfig

# settings that yarn alone reads
_OF_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


def check_rope(config: RunConfig) -> None:
    """Check the model's rotary embedding and those of the stages.

    There is one setting for main attention and index branch: that they differ cannot be written.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    model, kinds = config.model, {config.model.rope_type}
    if model.rope_factor < 1:
        raise ValueError(
            f"model.rope_factor={model.rope_factor:g}: must be at least 1, how many times longer the model "
            "is made; use model.rope_factor=1 for no scaling"
        )
    given = (model.rope_factor if model.rope_factor != 1 else 0.0, model.rope_original_length)
    _check_resolved(rope_of_model(model), model, "model", *given)
    for name, stage in config.stages.items():
        place = f"stages.{name}"
        if stage.rope_theta < 0:
            raise ValueError(f"{place}.rope_theta={stage.rope_theta:g}: must be positive, or 0: the model's")
        if stage.rope_factor and stage.rope_factor < 1:
            raise ValueError(
                f"{place}.rope_factor={stage.rope_factor:g}: must be at least 1, or 0: the model's"
            )
        rope = rope_of_stage(model, stage)
        kinds.add(rope.type)
        _check_resolved(rope, model, place, stage.rope_factor, stage.rope_original_length)
    _check_yarn_settings(model, uses_yarn=RopeType.yarn in kinds)


def _check_resolved(rope: Rope, model: ModelConfig, place: str, factor: float, original_length: int) -> None:
    """Check one rotary embedding.

    Args:
        rope: with everything derived.
        model: whose it is.
        place: where it is written: model, or stages.NAME.
        factor, original_length: as written there; 0 where they are not.
    """
    if original_length < 0:
        raise ValueError(f"{place}.rope_original_length={original_length}: must not be negative")
    if factor and rope.type is RopeType.default:
        raise ValueError(
            f"{place}.rope_factor={factor:g}: rope_type=default scales nothing; use "
            f"{place}.rope_type=linear, ntk or yarn, or leave the factor out"
        )
    if rope.type is not RopeType.default and rope.factor == 1:
        raise ValueError(
            f"{place}.rope_factor=1: rope_type={rope.type.value} scales nothing with it; use e.g. "
            f"{place}.rope_factor=5, or {place}.rope_type=default"
        )
    if rope.type is not RopeType.yarn:
        if original_length:
            raise ValueError(
                f"{place}.rope_original_length={original_length}: only yarn needs it, and rope_type is "
                f"{rope.type.value}; use {place}.rope_type=yarn or leave it out"
            )
        if rope.type is RopeType.ntk and model.rotary_dim < 4:
            raise ValueError(
                f"{place}.rope_type=ntk: needs 4 rotated channels, model.rotary_dim={model.rotary_dim}; "
                f"use {place}.rope_type=linear"
            )
        return
    if not rope.original_length:
        raise ValueError(
            f"{place}.rope_original_length=0: rope_type=yarn needs the tokens of the length before the "
            f"extension; use e.g. {place}.rope_original_length=196608"
        )
    if rope.theta <= 1:
        raise ValueError(
            f"{place}.rope_theta={rope.theta:g}: must be above 1 with rope_type=yarn; use "
            f"{place}.rope_theta=10000"
        )


def _check_yarn_settings(model: ModelConfig, *, uses_yarn: bool) -> None:
    for name in _OF_YARN:
        value = getattr(model, f"rope_{name}")
        if value < 0:
            raise ValueError(f"model.rope_{name}={value:g}: must be positive, or 0: derived")
        if value and not uses_yarn:
            raise ValueError(
                f"model.rope_{name}={value:g}: only yarn reads it; use model.rope_type=yarn or leave it out"
            )
    if not model.rope_truncate and not uses_yarn:
        raise ValueError(
            "model.rope_truncate=false: only yarn reads it; use model.rope_type=yarn or leave it out"
        )
    if bool(model.rope_mscale) != bool(model.rope_mscale_all_dim):
        name, other = ("mscale", "mscale_all_dim")[:: 1 if model.rope_mscale else -1]
        raise ValueError(
            f"model.rope_{name}={getattr(model, f'rope_{name}'):g}: has an effect beside "
            f"model.rope_{other} alone; give both or neither"
        )
    rope = rope_of_model(model) if model.rope_type is RopeType.yarn else None
    if rope is not None and rope.beta_fast < rope.beta_slow:
        raise ValueError(
            f"model.rope_beta_fast={rope.beta_fast:g}: must be at least model.rope_beta_slow="
            f"{rope.beta_slow:g}; use 32 and 1"
        )

"""Resolve what is written about the rotary embedding (RoPE): of the model, and of a stage that changes it.

Main attention and index branch read one table, so they can never have different ones.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from msa_train.config.model import ModelConfig
from msa_train.config.options import RopeType, StageRope
from msa_train.config.stages import StageConfig

BETA_FAST, BETA_SLOW = 32.0, 1.0
"what 0 means, as in transformers"


@dataclass(kw_only=True, slots=True, frozen=True)
class Rope:
    """Hold a rotary embedding with everything derived: what has no effect with its type has one value."""

    theta: float
    "base of the frequencies"
    type: RopeType = RopeType.default
    "how they are scaled"
    factor: float = 1.0
    "how many times longer; 1 scales nothing"
    original_length: int = 0
    "yarn: tokens of the length before the extension"
    beta_fast: float = BETA_FAST
    "yarn: a frequency with more turns than this within original_length stays"
    beta_slow: float = BETA_SLOW
    "yarn: one with fewer turns is divided by the factor"
    attention_factor: float = 1.0
    "yarn: factor on cosine and sine, of queries and keys alike"
    truncate: bool = True
    "yarn: the channels between which the division sets in are whole numbers"

    def base(self, rotary_dim: int) -> float:
        """Return the base of the frequencies of rotary_dim channels: theta, or what ntk makes of it.

        Example: ntk of factor 4 on 64 channels: theta * 4^(64 / 62).
        """
        if self.type is not RopeType.ntk:
            return self.theta
        return self.theta * self.factor ** (rotary_dim / (rotary_dim - 2))

    def ramp(self, rotary_dim: int) -> tuple[float, float]:
        """Return the pairs of channels between which yarn goes from unscaled to divided by the factor.

        Example: theta 10000, 64 channels, 4096 tokens -> 10, 23.
        """
        low, high = (self._pair(turns, rotary_dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        # as in transformers: nothing is divided by 0
        return low, high + 0.001 if low == high else high

    def _pair(self, turns: float, rotary_dim: int) -> float:
        """Find the pair of channels, not whole, that turns so often within original_length."""
        ratio = self.original_length / (turns * 2 * math.pi)
        return rotary_dim * math.log(ratio) / (2 * math.log(self.theta))

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it; plain JSON."""
        return asdict(self) | {"type": self.type.value}

    def __str__(self) -> str:
        text = f"{self.type.value}, theta {self.theta:g}"
        if self.type is not RopeType.default:
            text += f", factor {self.factor:g}"
        return text + (f", from {self.original_length} tokens" if self.original_length else "")


def rope_of_model(model: ModelConfig) -> Rope:
    """Resolve the settings of a model."""
    rope = Rope(theta=model.rope_theta, type=model.rope_type)
    if rope.type is not RopeType.default:
        rope = replace(rope, factor=model.rope_factor)
    if rope.type is not RopeType.yarn:
        return rope
    return replace(
        rope,
        original_length=model.rope_original_length,
        beta_fast=model.rope_beta_fast or BETA_FAST,
        beta_slow=model.rope_beta_slow or BETA_SLOW,
        attention_factor=_attention_factor(model),
        truncate=model.rope_truncate,
    )


def rope_of_stage(model: ModelConfig, stage: StageConfig) -> Rope:
    """Resolve the settings of a stage over those of its model; what a stage leaves open is the model's."""
    kind = model.rope_type if stage.rope_type is StageRope.model else RopeType(stage.rope_type.value)
    return rope_of_model(
        replace(
            model,
            rope_theta=stage.rope_theta or model.rope_theta,
            rope_type=kind,
            rope_factor=stage.rope_factor or model.rope_factor,
            rope_original_length=stage.rope_original_length or model.rope_original_length,
        )
    )


def _attention_factor(model: ModelConfig) -> float:
    """Return the factor on cosine and sine as written, or as transformers derives it.

    Example: factor 4, nothing else given: 0.1 * ln 4 + 1 = 1.139.
    """
    if model.rope_attention_factor:
        return model.rope_attention_factor

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(model.rope_factor) + 1 if model.rope_factor > 1 else 1.0

    if model.rope_mscale and model.rope_mscale_all_dim:
        return grown(model.rope_mscale) / grown(model.rope_mscale_all_dim)
    return grown(1.0)

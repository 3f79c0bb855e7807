"""Describe the stages of a training run: what is trained, how and for how long.

A run without stages is one stage of `train.steps` steps with sparse attention. The recipe of arXiv 2606.13392
section 4 has two: the main branch runs full attention while the index branch learns from all causal tokens
(`dense_warmup`), then both use selected blocks (`sparse`).
"""

from dataclasses import dataclass

from msa_train.config.options import KlTarget, StageAttention, StageRope


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """Hold one stage as the user writes it; stages follow one another in the order of the file."""

    tokens: int = 0
    "length, padding included, rounded up to whole steps; 0 in the last stage: up to train.steps"
    seq_len: int = 0
    "tokens of one pack; 0: data.seq_len"
    attention: StageAttention = StageAttention.sparse
    "what the main branch of MSA layers attends to"
    kl: KlTarget = KlTarget.auto
    "tokens over which the index branch is compared with the main branch"
    lr_scale: float = 1.0
    "factor on optim.lr and optim.muon_lr for the backbone; 0 freezes it"
    index_lr_scale: float = 1.0
    "the same for the index branch, besides optim.index_lr_scale"
    warmup_steps: int = 0
    "first steps of the stage over which the learning rates rise from 0"
    rope_theta: float = 0.0
    "base of the rotary frequencies in this stage; 0: model.rope_theta"
    rope_type: StageRope = StageRope.model
    "their scaling in this stage"
    rope_factor: float = 0.0
    "how many times longer than rope_original_length; 0: model.rope_factor"
    rope_original_length: int = 0
    "yarn: tokens of the length before the extension; 0: model.rope_original_length"

"""Describe the stages of a training run: what is trained, how and for how long.

A run without stages is one stage of `train.steps` steps with sparse attention. The recipe of arXiv 2606.13392
section 4 has two: the main branch runs full attention while the index branch learns from all causal tokens
(`dense_warmup`), then both use selected blocks (`sparse`).
"""

from dataclasses import dataclass, field
from typing import Any

from msa_train.config.options import KlTarget, StageAttention, StageRecompute, StageRope, StageSchedule


@dataclass(kw_only=True, slots=True)
class StageParallelConfig:
    """Lay out the ranks in one stage; what is left out is the run's. See [stages](stages.md)."""

    cp_size: int = 0
    "context parallelism; 0: parallel.cp_size"
    cp_head_size: int = 0
    "Ulysses degree; 0: parallel.cp_head_size"
    ep_size: int = 0
    "expert parallelism; 0: parallel.ep_size"
    tp_size: int = 0
    "tensor parallelism; 0: parallel.tp_size"
    pp_size: int = 0
    "pipeline parallelism; 0: parallel.pp_size"
    pp_layout: str = ""
    "layers of each pipeline stage; empty: parallel.pp_layout"


@dataclass(kw_only=True, slots=True)
class AlternateConfig:
    """Take shorter packs in every n-th step of a stage. See [stages](stages.md)."""

    every: int = 0
    "steps from one with shorter packs to the next; 0: none has them"
    seq_len: int = 0
    "tokens of one such pack"
    global_batch_size: int = 0
    "such packs per step; 0: as many tokens as the other steps have"


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
    topk: int = 0
    "blocks that a query selects; 0: attention.topk"
    global_batch_size: int = 0
    "packs per step; 0: batch_tokens, or train.global_batch_size"
    batch_tokens: int = 0
    "tokens of a step, padding included, in place of global_batch_size; a multiple of seq_len"
    lr: float = 0.0
    "peak of the backbone's learning rate in place of optim.lr, muon_lr in proportion; 0: optim.lr"
    index_lr: float = 0.0
    "peak of the index branch's, in place of lr * optim.index_lr_scale; 0: that"
    schedule: StageSchedule = StageSchedule.run
    "shape of the learning rate within the stage"
    min_lr_ratio: float = -1.0
    "linear and cosine: rate at the stage's end as a share of its peak; -1: optim.min_lr_ratio"
    parallel: StageParallelConfig = field(default_factory=StageParallelConfig)
    recompute: StageRecompute = StageRecompute.run
    "what is computed again in the backward pass"
    alternate: AlternateConfig = field(default_factory=AlternateConfig)
    rope_theta: float = 0.0
    "base of the rotary frequencies in this stage; 0: model.rope_theta"
    rope_type: StageRope = StageRope.model
    "their scaling in this stage"
    rope_factor: float = 0.0
    "how many times longer than rope_original_length; 0: model.rope_factor"
    rope_original_length: int = 0
    "yarn: tokens of the length before the extension; 0: model.rope_original_length"
    mixture: dict[str, Any] = field(default_factory=dict[str, Any])
    "weights of the stage's sources, as {books: 1, code: {over_512K: 1}}; empty: those of data.mixture"

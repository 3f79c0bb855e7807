"""Check rules between configuration fields, before any process starts.

Each violation is a ValueError of one line: name=value, the rule, the fix.
"""

import math
from collections.abc import Callable

from msa_train.config.deepspeed.rules import check_deepspeed
from msa_train.config.evaluation.rules import check_evaluation
from msa_train.config.mixture.rules import check_mixture
from msa_train.config.options import BadStep, CpLayout, EngineKind, OptimizerKind, Precision, QkNorm
from msa_train.config.rope.rules import check_rope
from msa_train.config.rules.exchange import check_exchange
from msa_train.config.rules.experts import check_dispatcher, check_expert_tiles
from msa_train.config.rules.kernels import check_full_kernel_device, check_kernels
from msa_train.config.rules.limits import check_sizes, check_total
from msa_train.config.rules.numbers import check_finite_numbers
from msa_train.config.rules.optimizer_memory import check_optimizer_memory
from msa_train.config.rules.pipeline import check_interleaving, check_pipeline
from msa_train.config.rules.recompute import check_recompute
from msa_train.config.rules.stages import check_stages
from msa_train.config.run import RunConfig
from msa_train.config.staging.views import check_views

# below it fp32 has no full precision, and processors may take the number for 0
_SMALLEST_FP32 = 1.2e-38


def resolve_engine(config: RunConfig, *, has_gpu: bool) -> EngineKind:
    """Return the engine that `auto` stands for on this kind of machine."""
    if config.engine is not EngineKind.auto:
        return config.engine
    return EngineKind.megatron if has_gpu else EngineKind.torch


def check_rules(config: RunConfig, *, world_size: int, has_gpu: bool) -> None:
    """Check everything that can be checked without reading files.

    Args:
        config: the whole run.
        world_size: number of worker processes over all nodes.
        has_gpu: the workers compute on GPUs.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    rules: tuple[Callable[[RunConfig], None], ...] = (
        check_mixture,
        check_finite_numbers,
        check_sizes,
        _names,
        _positive_sizes,
        check_stages,
        check_rope,
        check_total,
        _data,
        _index_heads,
        _training,
        check_optimizer_memory,
        _checkpoints,
        check_evaluation,
    )
    # in this order: later rules divide by sizes that earlier ones have found positive
    for rule in rules:
        rule(config)

    def check_sizes_of(view: RunConfig) -> None:
        for rule in _OF_STAGES:
            rule(view)
        _world(view, world_size)
        check_interleaving(view, world_size)
        _engine(view, has_gpu)

    check_views(config, check_sizes_of)
    check_full_kernel_device(config, has_gpu=has_gpu)


def _names(config: RunConfig) -> None:
    for name, value, fix in (
        ("name", config.name, "name=mine"),
        ("run_dir", config.run_dir, "run_dir=runs/mine"),
        ("data.corpus", config.data.corpus, "data.corpus=stdlib or the path of a text"),
        ("data.tokenizer", config.data.tokenizer, "data.tokenizer=bytes or the path of a tokenizer.json"),
    ):
        if not value.strip():
            raise ValueError(f"{name}={value}: must not be empty; use {fix}")


def _positive_sizes(config: RunConfig) -> None:
    parallel, train = config.parallel, config.train
    for name in ("cp_size", "cp_head_size", "ep_size", "tp_size", "pp_size"):
        if getattr(parallel, name) < 1:
            raise ValueError(f"parallel.{name}={getattr(parallel, name)}: must be at least 1")
    at_least_one = ["global_batch_size", "validation_packs", "max_skipped", "spike_window"]
    if not config.stages:
        at_least_one.append("steps")
    for name in at_least_one:
        if getattr(train, name) < 1:
            raise ValueError(f"train.{name}={getattr(train, name)}: must be at least 1")
    at_least_zero = {
        "train.steps": train.steps,
        "optim.index_lr_scale": config.optim.index_lr_scale,
        "optim.index_weight_decay": config.optim.index_weight_decay,
        "train.validate_every": train.validate_every,
        "logging.attention_every": config.logging.attention_every,
        "logging.selections_every": config.logging.selections_every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "checkpoint.retries": config.checkpoint.retries,
        "train.max_rollbacks": train.max_rollbacks,
        "optim.warmup_steps": config.optim.warmup_steps,
        "optim.schedule_steps": config.optim.schedule_steps,
        "optim.clip_grad": config.optim.clip_grad,
        "optim.weight_decay": config.optim.weight_decay,
        "launcher.num_processes": config.launcher.num_processes,
        "watchdog.timeout_s": config.watchdog.timeout_s,
        "data.seed": config.data.seed,
        "train.seed": train.seed,
        "model.shared_expert_hidden_size": config.model.shared_expert_hidden_size,
        "model.router_bias_update_rate": config.model.router_bias_update_rate,
    }
    for name, value in at_least_zero.items():
        if value < 0:
            raise ValueError(f"{name}={value}: must not be negative")
    for name, value in {
        "logging.every": config.logging.every,
        "logging.attention_queries": config.logging.attention_queries,
        "launcher.threads_per_process": config.launcher.threads_per_process,
        "launcher.timeout_s": config.launcher.timeout_s,
        "data.seq_len": config.data.seq_len,
    }.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")


def _sequence(config: RunConfig) -> None:
    # every rank holds whole blocks: cp_size shards of them, or 2 * cp_size chunks in the zigzag layout
    block_size, cp_size = config.attention.block_size, config.parallel.cp_size
    factors = f"parallel.cp_size * attention.block_size = {cp_size} * {block_size}"
    unit, fix = cp_size * block_size, ""
    if config.parallel.cp_layout is CpLayout.zigzag:
        factors = f"2 * parallel.cp_size * attention.block_size = 2 * {cp_size} * {block_size}"
        unit, fix = 2 * unit, ", or parallel.cp_layout=contiguous"
    seq_len = config.data.seq_len
    if seq_len % unit:
        lower = seq_len // unit * unit
        choices = f"{lower} or {lower + unit}" if lower else f"{unit}"
        raise ValueError(
            f"data.seq_len={seq_len}: must be a multiple of {factors} = {unit}; use {choices}{fix}"
        )


def _data(config: RunConfig) -> None:
    if not 0 <= config.data.validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction={config.data.validation_fraction}: must be from 0 to below 1"
        )
    if not 0 <= config.data.max_unknown <= 1:
        raise ValueError(f"data.max_unknown={config.data.max_unknown}: must be a share, from 0 to 1")
    if config.train.validate_every and not config.data.validation_fraction:
        raise ValueError(
            f"train.validate_every={config.train.validate_every}: no document is held out with "
            "data.validation_fraction=0; use train.validate_every=0 or a larger fraction"
        )


def _index_heads(config: RunConfig) -> None:
    rotary_dim, index_head_dim = config.model.rotary_dim, config.attention.index_head_dim
    if index_head_dim < rotary_dim:
        raise ValueError(
            f"attention.index_head_dim={index_head_dim}: must be at least model.rotary_dim={rotary_dim}, "
            f"as index heads are rotated too; use attention.index_head_dim={rotary_dim}"
        )


def _head_parallel(config: RunConfig) -> None:
    # tensor parallelism divides the KV heads first; Ulysses groups trade what is left on a rank
    parallel, groups = config.parallel, config.model.num_kv_heads // config.parallel.tp_size
    size = parallel.cp_head_size
    if parallel.cp_size % size:
        raise ValueError(
            f"parallel.cp_head_size={size}: must divide parallel.cp_size={parallel.cp_size}, of whose ranks "
            "it takes neighbours together; use parallel.cp_head_size=1"
        )
    if groups % size:
        raise ValueError(
            f"parallel.cp_head_size={size}: must divide the KV groups of a rank, model.num_kv_heads / "
            f"parallel.tp_size = {groups}; use parallel.cp_head_size={math.gcd(size, groups)}"
        )
    nodes = config.exchange.ranks_per_node
    if nodes > 0 and nodes % size:
        raise ValueError(
            f"exchange.ranks_per_node={nodes}: must be a multiple of parallel.cp_head_size={size}, as "
            "ranks that trade tokens for heads belong on one node; use "
            f"exchange.ranks_per_node={nodes + -nodes % size}"
        )


def _tensor_parallel(config: RunConfig) -> None:
    tp_size, model = config.parallel.tp_size, config.model
    for name in ("num_kv_heads", "vocab_size", "ffn_hidden_size"):
        if getattr(model, name) % tp_size:
            raise ValueError(
                f"model.{name}={getattr(model, name)}: parallel.tp_size={tp_size} must divide it"
            )
    if tp_size > 1 and model.qk_norm is QkNorm.width:
        raise ValueError(
            f"parallel.tp_size={tp_size}: model.qk_norm=width normalises over all heads, which tensor "
            "parallelism would cut; use parallel.tp_size=1"
        )
    local = config.data.seq_len // config.parallel.cp_size
    if local % tp_size:
        raise ValueError(
            f"parallel.tp_size={tp_size}: must divide data.seq_len / parallel.cp_size = {local} (sequence "
            "parallelism)"
        )
    if model.tie_embeddings and config.parallel.pp_size > 1:
        raise ValueError(
            f"parallel.pp_size={config.parallel.pp_size}: the first and last stage would have to share one "
            "embedding with model.tie_embeddings=true; use parallel.pp_size=1 or model.tie_embeddings=false"
        )


def _experts(config: RunConfig) -> None:
    ep_size, num_experts = config.parallel.ep_size, config.model.num_experts
    if num_experts % ep_size:
        raise ValueError(
            f"parallel.ep_size={ep_size}: must divide model.num_experts={num_experts}; "
            f"use one of {_divisors(num_experts)}"
        )


def _recording(config: RunConfig) -> None:
    every, parallel = config.logging.selections_every, config.parallel
    # a recording holds all KV heads of a rank's queries, which these two kinds of parallelism spread
    for name in ("tp_size", "cp_head_size"):
        if every > 0 and getattr(parallel, name) > 1:
            raise ValueError(
                f"logging.selections_every={every}: needs ranks that select for all KV groups; use "
                f"parallel.{name}=1 or logging.selections_every=0"
            )


def _training(config: RunConfig) -> None:
    optim = config.optim
    if not 0 < optim.lr < math.inf:
        raise ValueError(f"optim.lr={optim.lr}: must be positive")
    for name in ("min_lr_ratio", "decay_fraction"):
        if not 0 <= getattr(optim, name) <= 1:
            raise ValueError(f"optim.{name}={getattr(optim, name)}: must be from 0 to 1")
    model = config.model
    for name in ("rope_theta", "norm_eps", "init_std", "embedding_init_std"):
        if getattr(model, name) <= 0:
            raise ValueError(f"model.{name}={getattr(model, name)}: must be positive")
    if model.embedding_shared_std < 0:
        raise ValueError(
            f"model.embedding_shared_std={model.embedding_shared_std}: must not be negative; use 0 for none"
        )
    if not (optim.muon_lr > 0 and math.isfinite(optim.muon_lr)):
        raise ValueError(f"optim.muon_lr={optim.muon_lr}: must be positive and finite")
    if optim.eps < _SMALLEST_FP32:
        raise ValueError(
            f"optim.eps={optim.eps}: must be at least {_SMALLEST_FP32}, as weights without a gradient divide "
            "0 by it in fp32; use optim.eps=1e-8"
        )
    for name in ("beta1", "beta2", "muon_momentum"):
        if not 0 <= getattr(optim, name) < 1:
            raise ValueError(f"optim.{name}={getattr(optim, name)}: must be from 0 to below 1")


def _checkpoints(config: RunConfig) -> None:
    train, checkpoint = config.train, config.checkpoint
    if train.spike_factor and not 1 < train.spike_factor < math.inf:
        raise ValueError(
            f"train.spike_factor={train.spike_factor}: must be above 1, as it is compared with usual losses; "
            "use train.spike_factor=2, or 0 for none"
        )
    if train.bad_step is BadStep.rollback and not checkpoint.every:
        raise ValueError(
            "train.bad_step=rollback: there is nothing to go back to with checkpoint.every=0; use "
            "train.bad_step=skip or a larger checkpoint.every"
        )
    if checkpoint.every and checkpoint.keep_every % checkpoint.every:
        kept = -(-checkpoint.keep_every // checkpoint.every) * checkpoint.every
        raise ValueError(
            f"checkpoint.keep_every={checkpoint.keep_every}: must be a multiple of checkpoint.every="
            f"{checkpoint.every}, as others are hardly ever written; use checkpoint.keep_every={kept}"
        )


def _world(config: RunConfig, world_size: int) -> None:
    parallel = config.parallel
    # ranks that hold one copy of the model on one pack; experts may span several such units
    unit = parallel.tp_size * parallel.pp_size * parallel.cp_size
    if world_size % unit:
        raise ValueError(
            f"launcher.num_processes={world_size}: must be a multiple of parallel.tp_size * pp_size * cp_size"
            f" = {parallel.tp_size} * {parallel.pp_size} * {parallel.cp_size} = {unit}; "
            f"use launcher.num_processes={max(world_size // unit, 1) * unit} or smaller parallel sizes"
        )
    # experts are spread inside a pipeline stage, over all its ranks if need be
    stage = world_size // parallel.pp_size
    if stage % parallel.ep_size:
        raise ValueError(
            f"parallel.ep_size={parallel.ep_size}: must divide the {stage} ranks of a pipeline stage "
            f"(launcher.num_processes={world_size} / parallel.pp_size={parallel.pp_size}); "
            f"use one of {_divisors(stage)}"
        )
    # every data-parallel rank takes equally many packs of a step
    dp_size = world_size // unit
    if config.train.global_batch_size % dp_size:
        raise ValueError(
            f"train.global_batch_size={config.train.global_batch_size}: must be a multiple of the data-"
            f"parallel size {dp_size} (launcher.num_processes={world_size} / {unit}); use "
            f"train.global_batch_size={-(-config.train.global_batch_size // dp_size) * dp_size}"
        )


def _divisors(number: int) -> str:
    """List the divisors, "1, 2, 3, 6" of 6; by trial up to the root, so that a million ranks cost nothing."""
    # divisors come in pairs n, number / n with one of them at most the root
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return ", ".join(str(n) for n in sorted({*small, *(number // n for n in small)}))


def _engine(config: RunConfig, has_gpu: bool) -> None:
    engine, parallel = resolve_engine(config, has_gpu=has_gpu), config.parallel
    if engine is EngineKind.megatron and not has_gpu:
        raise ValueError(
            "engine=megatron: Megatron's optimizer and schedules need GPUs and none is used; "
            "use engine=torch (or engine=auto)"
        )
    if engine is EngineKind.deepspeed:
        check_deepspeed(config)
    overlaps = ("overlap_grad_reduce", "overlap_param_gather")
    if engine is EngineKind.torch:
        for name in overlaps:
            if getattr(parallel, name):
                raise ValueError(
                    f"parallel.{name}=true: is for engine=megatron; use parallel.{name}=false, or GPUs"
                )
        for name in ("tp_size", "pp_size"):
            if getattr(parallel, name) > 1:
                raise ValueError(
                    f"parallel.{name}={getattr(parallel, name)}: engine=torch has context, expert and data "
                    f"parallelism only; use parallel.{name}=1 or engine=megatron on GPUs"
                )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise ValueError(
            "parallel.overlap_param_gather=true: needs parallel.overlap_grad_reduce=true; set that too"
        )
    if engine is EngineKind.megatron and config.train.precision is Precision.fp64:
        raise ValueError("train.precision=fp64: is for engine=torch; use engine=torch, fp32 or bf16")
    if engine is EngineKind.megatron and config.optim.algorithm is OptimizerKind.muon:
        raise ValueError(
            "optim.algorithm=muon: is for engine=torch; use optim.algorithm=adamw or engine=torch"
        )


_OF_STAGES: tuple[Callable[[RunConfig], None], ...] = (
    _sequence,
    check_kernels,
    _tensor_parallel,
    check_pipeline,
    check_recompute,
    _head_parallel,
    _experts,
    check_expert_tiles,
    check_dispatcher,
    _recording,
    check_exchange,
)
"rules between sizes that a stage may have of its own, in this order"

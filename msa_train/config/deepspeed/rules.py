"""Check engine=deepspeed: which of its settings go together, and with the others'.

What DeepSpeed was seen to get wrong in silence, such as experts under ZeRO-3, is refused here.
"""

from msa_train.config.deepspeed.raw import check_raw
from msa_train.config.deepspeed.settings import DeepSpeedConfig
from msa_train.config.options import GradsDtype, MomentsDtype, Offload, OptimizerKind, Precision
from msa_train.config.run import RunConfig


def check_deepspeed(config: RunConfig) -> None:
    """Check everything that engine=deepspeed adds to the rules; call it for that engine alone.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    _check_parallel(config)
    _check_optimizer(config)
    _check_zero(config)
    _check_offload(config.deepspeed)
    check_raw(config.deepspeed.raw)


def _check_parallel(config: RunConfig) -> None:
    parallel, stage = config.parallel, config.deepspeed.zero_stage
    for name in ("tp_size", "pp_size"):
        if getattr(parallel, name) > 1:
            raise ValueError(
                f"parallel.{name}={getattr(parallel, name)}: engine=deepspeed has context, expert and data "
                f"parallelism only; use parallel.{name}=1 or engine=megatron on GPUs"
            )
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, name):
            raise ValueError(
                f"parallel.{name}=true: is for engine=megatron; use parallel.{name}=false and "
                "deepspeed.overlap_comm=true"
            )
    if stage == 3 and parallel.ep_size > 1:
        raise ValueError(
            f"parallel.ep_size={parallel.ep_size}: DeepSpeed's ZeRO-3 would mix experts of different ranks; "
            "use deepspeed.zero_stage=2, parallel.ep_size=1, or engine=megatron on GPUs"
        )


def _check_optimizer(config: RunConfig) -> None:
    optim = config.optim
    if optim.algorithm is OptimizerKind.muon:
        raise ValueError(
            "optim.algorithm=muon: takes whole matrices, which engine=deepspeed cuts over ranks; use "
            "optim.algorithm=adamw or engine=torch"
        )
    if optim.moments_dtype is not MomentsDtype.fp32:
        raise ValueError(
            f"optim.moments_dtype={optim.moments_dtype.value}: engine=deepspeed keeps moments in fp32; use "
            "optim.moments_dtype=fp32 (deepspeed.offload_optimizer moves them), or another engine"
        )
    if optim.grads_dtype is not GradsDtype.fp32:
        raise ValueError(
            f"optim.grads_dtype={optim.grads_dtype.value}: engine=deepspeed adds gradients up in fp32; use "
            "optim.grads_dtype=fp32 (deepspeed.zero_stage=2 partitions them), or another engine"
        )
    if optim.offload:
        raise ValueError(
            f"optim.offload={optim.offload:g}: engine=deepspeed has its own; use optim.offload=0 and "
            "deepspeed.offload_optimizer=cpu"
        )


def _check_zero(config: RunConfig) -> None:
    settings, precision = config.deepspeed, config.train.precision
    stage = settings.zero_stage
    if not 0 <= stage <= 3:
        raise ValueError(f"deepspeed.zero_stage={stage}: must be from 0 to 3; use deepspeed.zero_stage=2")
    if precision is Precision.fp64:
        raise ValueError(
            "train.precision=fp64: DeepSpeed reduces no fp64 gradients and keeps weights in fp32; use "
            "train.precision=fp32, or engine=torch"
        )
    if precision is Precision.bf16 and not stage:
        raise ValueError(
            "deepspeed.zero_stage=0: DeepSpeed adds gradients up in bf16 there, as train.precision=bf16; use "
            "deepspeed.zero_stage=1, train.precision=fp32, or engine=torch"
        )
    for name in ("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"deepspeed.{name}={getattr(settings, name)}: must be at least 1; use 50000000")
    if settings.allgather_bucket_size % 2:
        raise ValueError(
            f"deepspeed.allgather_bucket_size={settings.allgather_bucket_size}: must be even; use "
            f"deepspeed.allgather_bucket_size={settings.allgather_bucket_size + 1}"
        )
    if settings.param_persistence_threshold < 0:
        raise ValueError(
            f"deepspeed.param_persistence_threshold={settings.param_persistence_threshold}: must not be "
            "negative; use 0 for none"
        )


def _check_offload(settings: DeepSpeedConfig) -> None:
    optimizer, param, stage = settings.offload_optimizer, settings.offload_param, settings.zero_stage
    if optimizer is not Offload.none and not stage:
        raise ValueError(
            f"deepspeed.offload_optimizer={optimizer.value}: needs a partitioned optimizer; use "
            "deepspeed.zero_stage=1 or more"
        )
    if param is not Offload.none and stage != 3:
        raise ValueError(
            f"deepspeed.offload_param={param.value}: only deepspeed.zero_stage=3 partitions weights; "
            "use that, or deepspeed.offload_param=none"
        )
    if optimizer is Offload.nvme and stage != 3:
        raise ValueError(
            "deepspeed.offload_optimizer=nvme: DeepSpeed has it with deepspeed.zero_stage=3 alone; use that, "
            "or deepspeed.offload_optimizer=cpu"
        )
    if settings.uses_nvme and not settings.nvme_path.strip():
        raise ValueError(
            "deepspeed.nvme_path=: offload to nvme needs a folder on a local disk; use "
            "deepspeed.nvme_path=/local_nvme"
        )

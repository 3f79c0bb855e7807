"""Write DeepSpeed's JSON: what follows from the run, then `deepspeed.raw`."""

from collections.abc import Mapping
from typing import Any, cast

from msa_train.config.deepspeed.settings import DeepSpeedConfig
from msa_train.config.options import Offload, Precision
from msa_train.config.run import RunConfig

SUB_GROUP_SIZE = 50_000_000
"elements of a rank that are brought in from files at a time; at least one parameter's"
STATE_BUFFERS = 3
"buffers of one sub-group, in fp32"


def sub_group_size(settings: DeepSpeedConfig) -> int:
    """Return how many elements of a rank are brought in from files at a time."""
    zero = settings.raw.get("zero_optimization", {})
    return int(zero.get("sub_group_size", SUB_GROUP_SIZE))


def deepspeed_json(config: RunConfig) -> dict[str, Any]:
    """Return the JSON of a run that the rules have passed.

    DeepSpeed is told one pack per rank and step: how many there are differs from step to step, so the engine
    says which one is the last. It neither clips nor divides; only with zero_stage=3 it has no sum over ranks,
    and the engine undoes its mean.
    """
    settings = config.deepspeed
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # the default became 1.0 in 0.19.3
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        # ours is a subclass of torch's AdamW, on the host too
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(settings, config.train.precision),
    }
    if config.train.precision is Precision.bf16:
        # the step guard judges before the update; DeepSpeed would pass steps over without saying so
        made["bf16"] = {"enabled": True, "check_grad_overflow": False, "immediate_grad_update": True}
    if settings.zero_stage < 3:
        made["gradient_allreduce_op"] = "sum"
    return _merged(made, settings.raw)


def _zero(settings: DeepSpeedConfig, precision: Precision) -> dict[str, Any]:
    stage = settings.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": settings.reduce_bucket_size,
        "allgather_bucket_size": settings.allgather_bucket_size,
        "overlap_comm": settings.overlap_comm,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": settings.prefetch_bucket_size,
            "stage3_param_persistence_threshold": settings.param_persistence_threshold,
        }
    elif stage and settings.offload_optimizer is Offload.none and (stage == 2 or precision is Precision.fp32):
        # the engine has computed it already; in the cases left out DeepSpeed insists
        zero["compute_grad_norm"] = False
    for name in ("offload_optimizer", "offload_param"):
        where: Offload = getattr(settings, name)
        if where is not Offload.none:
            zero[name] = {"device": where.value}
        if where is Offload.nvme:
            zero[name]["nvme_path"] = settings.nvme_path
            # DeepSpeed's 1e9 would take 12 GB of buffers
            zero["sub_group_size"] = SUB_GROUP_SIZE
    if settings.offload_optimizer is Offload.nvme:
        # fp32 weights and two moments; gradients stay in memory
        zero["offload_optimizer"]["buffer_count"] = STATE_BUFFERS
    if settings.offload_param is Offload.nvme:
        # else the first 1e9 of a rank's weights would stay in memory
        zero["offload_param"]["max_in_cpu"] = 0
        # weights that come again soon would keep their buffers, of which there are only those of two layers
        zero["stage3_max_reuse_distance"] = 0
    return zero


def _merged(made: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Put one mapping over another, key by key at every depth.

    Example: {"a": {"b": 1}} and {"a": {"c": 2}} -> {"a": {"b": 1, "c": 2}}.
    """
    result = dict(made)
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            value = _merged(result[key], cast(Mapping[str, Any], value))
        result[key] = value
    return result

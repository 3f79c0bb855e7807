"""Check `deepspeed.raw`: what it may not say, because msa-train says it or because it is wrong.

DeepSpeed answers some contradictions late and some not at all: with its own sequence parallelism it trains on
and is wrong. It passes over sections that it does not know; inside zero_optimization it refuses such keys.
"""

from collections.abc import Iterator
from typing import Any, cast

_BATCHES = "is derived from the packs of a step; use train.global_batch_size"
_SUMS = "would change how gradients are added up: losses are divided by the counts of the step; leave it out"
_DTYPES = "follows from train.precision; gradients are added up and sent in fp32; leave it out"
_SEQUENCES = (
    "is DeepSpeed's own sequence parallelism, which reduces gradients over too few ranks beside "
    "parallel.cp_size; use parallel.cp_size"
)
_TILES = "loses gradients where tiles do not divide the tokens evenly; use train.tile_tokens"
_GROUPS = "would cut the one group of data and context parallel ranks; leave it out"
_OPTIMIZER = "comes from optim.*; use that"
_LOSSY = "sends rounded numbers, which none of the comparisons here hold for; leave it out"
_OURS = "is done by msa-train itself; leave it out"

# by dotted key in DeepSpeed's JSON; what is below a key is refused with it
_REFUSED = {
    "train_batch_size": _BATCHES,
    "train_micro_batch_size_per_gpu": _BATCHES,
    "gradient_accumulation_steps": _BATCHES,
    "managed_gradient_accumulation": _BATCHES,
    "gradient_clipping": "is done before the update; use optim.clip_grad",
    "gradient_allreduce_op": _SUMS,
    "prescale_gradients": _SUMS,
    "gradient_predivide_factor": _SUMS,
    "sparse_gradients": _SUMS,
    "communication_data_type": _DTYPES,
    "seq_parallel_communication_data_type": _DTYPES,
    "data_types": _DTYPES,
    "bf16": _DTYPES,
    "bfloat16": _DTYPES,
    "fp16": _DTYPES,
    "amp": _DTYPES,
    "torch_autocast": _DTYPES,
    "optimizer": _OPTIMIZER,
    "scheduler": _OPTIMIZER,
    "zero_allow_untested_optimizer": _OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _OPTIMIZER,
    "sequence_parallel_size": _SEQUENCES,
    "data_parallel_size": _SEQUENCES,
    "mesh_param": _SEQUENCES,
    "mesh_device": _SEQUENCES,
    "tensor_parallel": "needs engine=megatron; use parallel.tp_size there",
    "autotp_size": "needs engine=megatron; use parallel.tp_size there",
    "pipeline": "needs engine=megatron; use parallel.pp_size there",
    "expert_parallel": "replaces the layers of other models; use parallel.ep_size",
    "use_data_before_expert_parallelism": "follows from parallel.ep_size; leave it out",
    "compile": "DeepCompile takes gradient reduction away from ZeRO; leave it out",
    "checkpoint": "checkpoints are msa-train's own; use checkpoint.*",
    "load_universal_checkpoint": "checkpoints are msa-train's own; use checkpoint.*",
    "nebula": "checkpoints are msa-train's own; use checkpoint.*",
    "activation_checkpointing": "is msa-train's own; use train.recompute",
    "elasticity": "starts runs anew with other batches; use msa-submit",
    "autotuning": "starts runs of its own; leave it out",
    "curriculum_learning": _OURS,
    "data_efficiency": _OURS,
    "compression_training": _OURS,
    "progressive_layer_drop": _OURS,
    "hybrid_engine": _OURS,
    "zero_optimization.stage": "use deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "use deepspeed.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "use deepspeed.nvme_path",
    "zero_optimization.offload_optimizer.super_offload": _OPTIMIZER,
    "zero_optimization.offload_optimizer.ratio": _OPTIMIZER,
    "zero_optimization.offload_optimizer.fast_init": "needs buffers of other sizes than ours; leave it out",
    "zero_optimization.offload_param.device": "use deepspeed.offload_param",
    "zero_optimization.offload_param.nvme_path": "use deepspeed.nvme_path",
    "aio.use_gds": "moves files past the host, which checkpoints were not made for; leave it out",
    "zero_optimization.cpu_offload": "use deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "use deepspeed.offload_param",
    "zero_optimization.reduce_bucket_size": "use deepspeed.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "use deepspeed.allgather_bucket_size",
    "zero_optimization.overlap_comm": "use deepspeed.overlap_comm",
    "zero_optimization.stage3_prefetch_bucket_size": "use deepspeed.prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold": "use deepspeed.param_persistence_threshold",
    "zero_optimization.contiguous_gradients": "experts need contiguous gradients; leave it out",
    "zero_optimization.reduce_scatter": "experts need reduce_scatter; leave it out",
    "zero_optimization.compute_grad_norm": "the norm is msa-train's own; leave it out",
    "zero_optimization.zenflow": "updates some weights later than others; leave it out",
    "zero_optimization.zero_hpz_partition_size": _GROUPS,
    "zero_optimization.mics_shard_size": _GROUPS,
    "zero_optimization.zero_quantized_weights": _LOSSY,
    "zero_optimization.zero_quantized_nontrainable_weights": _LOSSY,
    "zero_optimization.zero_quantized_gradients": _LOSSY,
    "zero_optimization.leaf_module": "layers are gathered whole; leave it out",
    "zero_optimization.stage3_module_granularity_threshold": "layers are gathered whole; leave it out",
}
# what is no section of DeepSpeed's would be passed over in silence
_ALLOWED = (
    "zero_optimization",
    "aio",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
)
# wherever they stand: names of DeepSpeed's tiles and of its sequence parallelism
_REFUSED_WORDS = {
    "tiled": _TILES,
    "alst": _TILES,
    "ulysses": _SEQUENCES,
    "sequence_parallel": _SEQUENCES,
    "mesh": _SEQUENCES,
}


def check_raw(raw: dict[str, Any]) -> None:
    """Check that deepspeed.raw contradicts nothing.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    for key, value in _leaves(raw, ""):
        for refused, reason in _REFUSED.items():
            if f"{key}.".startswith(f"{refused}."):
                raise ValueError(f"deepspeed.raw.{key}={value}: {reason}")
        for word, reason in _REFUSED_WORDS.items():
            if word in key.lower():
                raise ValueError(f"deepspeed.raw.{key}={value}: {reason}")
        if key.partition(".")[0] not in _ALLOWED:
            raise ValueError(
                f"deepspeed.raw.{key}={value}: no section that may be set; use one of {', '.join(_ALLOWED)}"
            )


def _leaves(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    """Yield every value with its dotted key, an empty mapping included."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(cast(dict[str, Any], value), f"{key}.")
        else:
            yield key, value

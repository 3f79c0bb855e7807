"""Count the bytes of weights, gradients and optimizer states of a rank."""

from dataclasses import dataclass

from msa_train.config import Precision, RunConfig
from msa_train.plan.stage_parameters import RankParameters


@dataclass(slots=True, frozen=True)
class StateBytes:
    """Hold bytes of one rank."""

    weights: float
    "on the device"
    gradients: float
    "on the device"
    optimizer: float
    "on the device: fp32 weights and moments of this rank's share"
    on_host: float
    "of the optimizer, in host memory"


def state_bytes(config: RunConfig, world_size: int, counts: RankParameters) -> StateBytes:
    """Count the states of a rank under Megatron's distributed optimizer.

    Args:
        config: the run.
        world_size: ranks of the job.
        counts: parameters of the rank.

    Example: bf16, 4.1B dense parameters over 64 ranks and 1.7B of experts on this rank alone: weights 11.6,
    gradients 23.2, optimizer 21.2 GB.
    """
    parallel = config.parallel
    stage_ranks = world_size // parallel.pp_size
    held = counts.dense + counts.experts
    # tensor-parallel ranks hold different dense parameters, and different experts as well
    own = counts.dense / (stage_ranks / parallel.tp_size) + counts.experts / (stage_ranks / parallel.ep_size)
    width = 2 if config.train.precision is Precision.bf16 else 4
    states = per_parameter(config) * own
    return StateBytes(
        weights=width * held,
        gradients=gradient_width(config) * held,
        optimizer=states * (1 - config.optim.offload),
        on_host=states * config.optim.offload,
    )


def per_parameter(config: RunConfig) -> float:
    """Return the bytes of master weight and moments of one parameter: 12 in fp32."""
    moments = {"fp32": 8.0, "bf16": 4.0, "fp8": 2.0 + 2 * 4 / 128}[config.optim.moments_dtype.value]
    # fp32 training has its weights as they are
    return moments + (4.0 if config.train.precision is Precision.bf16 else 0.0)


def gradient_width(config: RunConfig) -> int:
    """Return the bytes of one gradient."""
    return 2 if config.optim.grads_dtype.value == "bf16" else 4

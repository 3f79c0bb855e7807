"""Check the switches that make gradients and optimizer states smaller: which go together."""

from msa_train.config.options import GradsDtype, MomentsDtype, OptimizerKind, Precision
from msa_train.config.run import RunConfig

# A rounding to 3 bits is off by up to 12%; a mean over n steps has sqrt(n / 2) times its error.
_LARGEST_FP8_BETA2 = 0.98


def check_optimizer_memory(config: RunConfig) -> None:
    """Check optim.moments_dtype, optim.grads_dtype and optim.offload.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    optim, precision = config.optim, config.train.precision
    if not 0 <= optim.offload <= 1:
        raise ValueError(
            f"optim.offload={optim.offload}: must be from 0 (all on the device) to 1 (all on the host)"
        )
    if optim.grads_dtype is GradsDtype.bf16 and precision is not Precision.bf16:
        raise ValueError(
            f"optim.grads_dtype=bf16: train.precision={precision.value} makes gradients that it would round; "
            "use optim.grads_dtype=fp32 or train.precision=bf16"
        )
    if optim.grads_dtype is GradsDtype.bf16 and config.parallel.overlap_grad_reduce:
        raise ValueError(
            "optim.grads_dtype=bf16: is summed over ranks in fp32 after the backward pass; use "
            "parallel.overlap_grad_reduce=false or optim.grads_dtype=fp32"
        )
    if optim.moments_dtype is not MomentsDtype.fp32 and precision is Precision.fp64:
        raise ValueError(
            f"optim.moments_dtype={optim.moments_dtype.value}: train.precision=fp64 is for exactness; "
            "use optim.moments_dtype=fp32, which then means fp64"
        )
    if optim.moments_dtype is MomentsDtype.fp8 and optim.beta2 > _LARGEST_FP8_BETA2:
        raise ValueError(
            f"optim.beta2={optim.beta2}: second moments in fp8 add up roundings of 1 / (1 - beta2) steps; "
            f"use optim.beta2=0.95 (up to {_LARGEST_FP8_BETA2}) or optim.moments_dtype=bf16"
        )
    if optim.algorithm is OptimizerKind.muon:
        _refuse_with_muon("moments_dtype", optim.moments_dtype.value, "fp32")
        _refuse_with_muon("grads_dtype", optim.grads_dtype.value, "fp32")
        _refuse_with_muon("offload", f"{optim.offload:g}", "0")


def _refuse_with_muon(name: str, value: str, default: str) -> None:
    if value != default:
        raise ValueError(
            f"optim.{name}={value}: is for AdamW; Muon takes whole matrices, in fp32 and on the device; use "
            f"optim.{name}={default} or optim.algorithm=adamw"
        )

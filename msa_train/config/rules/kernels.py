"""Check that the kernels of attention that are asked for can compute what the run asks of them."""

from msa_train.config.options import AttentionKernel, FullKernel, Precision
from msa_train.config.run import RunConfig


def check_kernels(config: RunConfig) -> None:
    """Check kernels against the precision; whether a library is installed is seen where the run computes.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    kernel, full, precision = config.attention.kernel, config.attention.full_kernel, config.train.precision
    if kernel is AttentionKernel.triton and precision is Precision.fp64:
        raise ValueError(
            "attention.kernel=triton: has no fp64 as train.precision=fp64 wants it; use attention.kernel=auto"
        )
    if full not in (FullKernel.auto, FullKernel.torch) and precision is not Precision.bf16:
        raise ValueError(
            f"attention.full_kernel={full.value}: has 16 bits only, not train.precision={precision.value}; "
            "use attention.full_kernel=auto"
        )


def check_full_kernel_device(config: RunConfig, *, has_gpu: bool) -> None:
    """Check that there are GPUs for a kernel of GPUs.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    full = config.attention.full_kernel
    if full not in (FullKernel.auto, FullKernel.torch) and not has_gpu:
        raise ValueError(
            f"attention.full_kernel={full.value}: runs on GPUs, and this run is on CPUs; use "
            "attention.full_kernel=auto"
        )

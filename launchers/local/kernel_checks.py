"""Check what will compute attention on this machine: refuse what cannot run, and name what would be slow."""

from importlib.util import find_spec

from msa_train.config import (
    AttentionKernel,
    AttentionKind,
    FullKernel,
    Implementation,
    MoeDispatcher,
    Precision,
    RunConfig,
)


def check_kernel(config: RunConfig, *, on_gpu: bool) -> None:
    """Check that Triton can be used where it is asked for.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    if config.attention.kernel is not AttentionKernel.triton or not _has_blocks(config):
        return
    # not at the top of the file: torch takes seconds, and all other kernels run everywhere
    import torch
    from msa_kernels.dispatch import choose_kernel

    try:
        choose_kernel("triton", torch.device("cuda" if on_gpu else "cpu"), _why_not_triton(config))
    except ValueError as error:
        raise ValueError(str(error).replace("kernel=", "attention.kernel=")) from None


def check_full_kernel(config: RunConfig, *, on_gpu: bool) -> None:
    """Check that the library that is to compute full attention is installed; the GPU itself is not asked.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    kernel = config.attention.full_kernel
    if kernel in (FullKernel.auto, FullKernel.torch) or not on_gpu:
        return
    # not at the top of the file: torch takes seconds
    import torch
    from msa_kernels.full_attention.choice import choose_by_rule, installed_machine

    try:
        choose_by_rule(kernel.value, installed_machine(), torch.bfloat16, config.model.head_dim)
    except ValueError as error:
        raise ValueError(str(error).replace("full_kernel=", "attention.full_kernel=")) from None


def full_kernel_line(config: RunConfig, *, on_gpu: bool) -> str | None:
    """Say what computes full attention on these GPUs and why; None on CPUs, or where no layer attends fully.

    Call it where no worker is forked afterwards: it opens the GPU.

    Example: "full attention by cudnn: flash3: not installed".
    """
    if not on_gpu or AttentionKind.full not in config.model.attention_kinds():
        return None
    import torch
    from msa_kernels.full_attention.choice import describe_choice

    dtypes = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32, Precision.fp64: torch.float64}
    return describe_choice(
        config.attention.full_kernel.value,
        torch.device("cuda"),
        dtypes[config.train.precision],
        config.model.head_dim,
    )


def check_implementation(config: RunConfig, *, on_gpu: bool, is_here: bool = True) -> None:
    """Check that Transformer Engine can be used where it is asked for; is_here: by this machine's packages.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    if config.model.implementation is Implementation.torch:
        return
    reason = ""
    if is_here and find_spec("transformer_engine") is None:
        reason = "the transformer-engine package is not installed; install it"
    elif not on_gpu:
        reason = "runs on GPUs and none is used; use GPUs"
    elif config.train.precision is Precision.fp64:
        reason = "has no fp64 as train.precision=fp64 wants it; use bf16 or fp32"
    if reason:
        raise ValueError(
            f"model.implementation=transformer_engine: {reason}, or use model.implementation=torch"
        )


def check_dispatcher_package(config: RunConfig, *, on_gpu: bool, is_here: bool = True) -> None:
    """Check that DeepEP can be used where it is asked for; is_here: by this machine's packages.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    if config.parallel.moe_dispatcher is not MoeDispatcher.deepep:
        return
    reason = ""
    if is_here and find_spec("deep_ep") is None:
        reason = "the deep_ep package is not installed; install DeepEP"
    elif not on_gpu:
        reason = "runs on GPUs and none is used; use GPUs"
    if reason:
        raise ValueError(f"parallel.moe_dispatcher=deepep: {reason}, or use parallel.moe_dispatcher=alltoall")


def kernel_warning(config: RunConfig, *, on_gpu: bool) -> str | None:
    """Return why attention.kernel=auto does not take Triton on these GPUs; None where it does, or on CPUs.

    `auto` is decided call by call, in silence, as it must be the same in every call of a layer: a run whose
    sizes have no tile would be correct and many times slower. One process says so, before the ranks start.

    Example: attention.topk=80 -> "attention.kernel=auto: takes the tiled torch path ... topk=80: must be from
    1 to 64; ...".
    """
    if not on_gpu or config.attention.kernel is not AttentionKernel.auto or not _has_blocks(config):
        return None
    from msa_kernels.dispatch import has_triton

    reason = _why_not_triton(config)
    if not has_triton():
        reason = "triton is not installed; install msa-train[kernels]"
    elif reason is not None:
        reason += "; use sizes that Triton has tiles for, or attention.kernel=cpu if this is meant"
    if reason is None:
        return None
    return f"attention.kernel=auto: takes the tiled torch path on the GPUs, which is far slower: {reason}"


def _has_blocks(config: RunConfig) -> bool:
    """Tell whether any layer attends to blocks, selected or in a window."""
    return set(config.model.attention_kinds()) != {AttentionKind.full}


def _why_not_triton(config: RunConfig) -> str | None:
    """Return why a layer of this model has no Triton kernel, "name=value: rule"; None where all have."""
    import torch
    from msa_kernels.support import why_not_triton

    model, attention = config.model, config.attention
    has_index = AttentionKind.msa in model.attention_kinds()
    dtypes = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32, Precision.fp64: torch.float64}
    return why_not_triton(
        dtypes[config.train.precision],
        num_kv_heads=model.num_kv_heads,
        heads_per_group=model.num_heads // model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=attention.block_size,
        index_head_dim=attention.index_head_dim if has_index else 0,
        topk=attention.topk,
    )

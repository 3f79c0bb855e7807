"""Count the bytes of weights, gradients and optimizer states for each parameter of a rank, by arithmetic."""

from dataclasses import dataclass

from msa_train.config.options import GradsDtype, MomentsDtype, Precision
from msa_train.config.run import OptimConfig

FP8_BLOCK = 256
"values of an fp8 moment that share one fp32 scale"
PIECE_ELEMENTS = 2**24
"parameters that the update takes at a time"
STREAMED_ELEMENTS = 2**23
"parameters of one transfer of optimizer states from and to the host"
STREAM_SLOTS = 3
"transfers at a time: one comes, one is updated, one goes"

_MOMENT_BYTES = {MomentsDtype.fp32: 4.0, MomentsDtype.bf16: 2.0, MomentsDtype.fp8: 1.0 + 4.0 / FP8_BLOCK}


@dataclass(kw_only=True, frozen=True, slots=True)
class OptimizerBytes:
    """Hold bytes for one parameter.

    Unsharded: for every parameter that the rank computes with. Sharded: for every parameter that the rank
    updates; Megatron's distributed optimizer cuts a rank's parameters over the ranks that share them, while
    with engine=torch each rank updates all of its own.
    """

    weight: float
    "unsharded, on the device: the weight that layers compute with"
    gradient: float
    "unsharded, on the device: its place in the gradient buffer"
    state: float
    "sharded, on the device: fp32 weight and moments"
    host_state: float
    "sharded, in pinned host memory: the share of them that optim.offload moves there"
    step_temporary: int
    "of the whole update, on the device, at most; not per parameter"

    @property
    def unsharded(self) -> float:
        """Return the device bytes per parameter that the rank computes with."""
        return self.weight + self.gradient


def optimizer_bytes(optim: OptimConfig, precision: Precision) -> OptimizerBytes:
    """Count the bytes per parameter of a setting.

    Example: bf16 -> weight 2, gradient 4, state 12: the well-known 18. With fp8 moments, bf16 gradients and
    half the state on the host: 2, 2 and 3.016 on the device, 3.016 on the host. The experts of m3 on 256
    ranks, 1.61B each without copies: 29.0 GB and 11.3 GB on the device.

    Muon keeps 4 bytes of moments for the layers' matrices in place of AdamW's 8, which are counted here: it
    is the upper bound. Parameters are offloaded whole, so the true share is off by at most one parameter.

    Args:
        optim: the settings.
        precision: of the weights.
    """
    wide = 8.0 if precision is Precision.fp64 else 4.0
    moment = wide if optim.moments_dtype is MomentsDtype.fp32 else _MOMENT_BYTES[optim.moments_dtype]
    # 16-bit weights are updated through fp32 copies; others are their own
    master = 4.0 if precision is Precision.bf16 else 0.0
    state = master + 2 * moment
    gradient = 2.0 if optim.grads_dtype is GradsDtype.bf16 else wide
    return OptimizerBytes(
        weight=2.0 if precision is Precision.bf16 else wide,
        gradient=gradient,
        state=state * (1 - optim.offload),
        host_state=state * optim.offload,
        step_temporary=_step_temporary(optim, wide, state),
    )


def _step_temporary(optim: OptimConfig, wide: float, state: float) -> int:
    """Count what one piece of the update needs beside the states, and the places of those that stream."""
    # square root and its quotient; both moments, the gradient and their rounding where they are not fp32
    tensors = 2 if optim.moments_dtype is MomentsDtype.fp32 else 5
    tensors += 1 if optim.grads_dtype is GradsDtype.bf16 else 0
    streamed = STREAM_SLOTS * STREAMED_ELEMENTS * state if optim.offload else 0
    return int(tensors * PIECE_ELEMENTS * wide + streamed)

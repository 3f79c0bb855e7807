"""Count the bytes of weights, gradients and optimizer states for each parameter with engine=deepspeed.

By arithmetic over the tensors that DeepSpeed 0.19 makes; benchmarks/engines/memory.py measures them.
"""

from dataclasses import dataclass

from msa_train.config.deepspeed.settings import DeepSpeedConfig
from msa_train.config.options import Offload, Precision

_WEIGHT, _MOMENTS, _GRADIENT = 4.0, 8.0, 4.0


@dataclass(kw_only=True, frozen=True, slots=True)
class ZeroBytes:
    """Hold bytes for one parameter; `whole_` of all that a rank computes with, `own_` of its part of them.

    A rank's part is 1 / N of the parameters that N ranks share.
    """

    whole_weight: float = 0.0
    "on the device, with stages 0 to 2"
    own_weight: float = 0.0
    "on the device, with stage 3"
    whole_gradient: float = 0.0
    "on the device, with stages 0 and 1"
    own_gradient: float = 0.0
    "on the device: what is reduced already"
    whole_state: float = 0.0
    "on the device, with stage 0: moments"
    own_state: float = 0.0
    "on the device: fp32 weight and moments"
    own_host: float = 0.0
    "in host memory: what is moved there, with its gradients"
    temporary: int = 0
    "bytes on the device of the buckets that gradients are reduced in; not per parameter"

    def device(self, held: float, own: float) -> dict[str, float]:
        """Return the device bytes of a rank by part.

        Args:
            held: parameters that it computes with.
            own: parameters that it updates.
        """
        return {
            "weights": self.whole_weight * held + self.own_weight * own,
            "gradients": self.whole_gradient * held + self.own_gradient * own,
            "optimizer": self.whole_state * held + self.own_state * own,
        }


def zero_bytes(settings: DeepSpeedConfig, precision: Precision) -> ZeroBytes:
    """Count the bytes of a stage of ZeRO with its offload.

    Example: bf16 over N ranks, on the device: stage 1 takes 6 + 12 / N, stage 2 takes 2 + 16 / N, stage 3
    takes 18 / N; with the optimizer in host memory stage 2 takes 2, and 18 / N there. A dense model of 70B on
    256 ranks with stage 3: 4.9 GB each, besides the layers at hand.

    What nvme keeps in files counts as nothing; buffers on the way to them are DeepSpeed's buffer_count times
    its largest sub-group.

    Args:
        settings: of the engine.
        precision: of the weights.
    """
    stage = settings.zero_stage
    weight = 2.0 if precision is Precision.bf16 else 8.0 if precision is Precision.fp64 else 4.0
    if stage == 0:
        return ZeroBytes(whole_weight=weight, whole_gradient=weight, whole_state=2 * weight)
    bucket = int(_GRADIENT * settings.reduce_bucket_size * (2 if settings.overlap_comm else 1))
    is_moved = settings.offload_optimizer is not Offload.none
    if stage == 3:
        # weights in fp32 are the optimizer's own, unless that is elsewhere
        state = _MOMENTS + (_WEIGHT if is_moved or weight < _WEIGHT else 0.0)
        # gradients are gathered in one buffer and given to the update in others
        host = {Offload.none: 0.0, Offload.cpu: state + 2 * _GRADIENT, Offload.nvme: _GRADIENT}
        return ZeroBytes(
            own_weight=weight if settings.offload_param is Offload.none else 0.0,
            own_gradient=0.0 if is_moved else _GRADIENT,
            own_state=0.0 if is_moved else state,
            own_host=host[settings.offload_optimizer]
            + (weight if settings.offload_param is Offload.cpu else 0.0),
            temporary=bucket,
        )
    state = _WEIGHT + _MOMENTS
    if is_moved:
        # updated weights are rounded there before they come back
        return ZeroBytes(
            whole_weight=weight,
            whole_gradient=_GRADIENT if stage == 1 else 0.0,
            own_host=state + _GRADIENT + weight,
            temporary=bucket,
        )
    is_flat = stage == 1 and precision is Precision.bf16
    return ZeroBytes(
        whole_weight=weight,
        whole_gradient=_GRADIENT if stage == 1 else 0.0,
        own_gradient=0.0 if is_flat else _GRADIENT,
        own_state=state,
        temporary=0 if is_flat else bucket,
    )

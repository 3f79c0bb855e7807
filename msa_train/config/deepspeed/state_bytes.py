"""Count the bytes of weights, gradients and optimizer states for each parameter with engine=deepspeed.

By arithmetic over the tensors that DeepSpeed 0.19 makes; benchmarks/engines/memory.py measures them.
"""

from dataclasses import dataclass

from msa_train.config.deepspeed.settings import DeepSpeedConfig
from msa_train.config.deepspeed.to_json import STATE_BUFFERS, sub_group_size
from msa_train.config.optimizer_bytes import PIECE_ELEMENTS
from msa_train.config.options import Offload, Precision

_WEIGHT, _MOMENTS, _GRADIENT = 4.0, 8.0, 4.0
# elements that DeepSpeed keeps gathered with stage 3, and reduces at once with stage 1 in bf16
_GATHERED, _REDUCED = 1e9, 5e8
UPDATE_BYTES = 2 * 4 * PIECE_ELEMENTS
"square root and quotient of one piece, on the device or the host, wherever the update is"


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
    own_file: float = 0.0
    "in files: what is moved there"
    own_staged: float = 0.0
    "in files while a checkpoint is saved or loaded, where anything is in files"
    sub_group: int = 0
    "parameters that are brought in from files at a time"
    buffered: float = 0.0
    "in locked host memory, for each parameter of a sub-group: the buffers that it is brought into"
    temporary: int = 0
    "bytes on the device of the buckets that gradients are reduced in; not per parameter"
    whole_step: float = 0.0
    "on the device during a step: gathered weights with stage 3, or all gradients flat while they are reduced"
    at_a_time: float = _REDUCED
    "parameters of whole_step, at most"
    own_step: float = 0.0
    "on the device during a step: gradients laid end to end for the update"
    keeps_gradients: bool = True
    "gradients stay between steps"

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

    def step(self, held: float, own: float) -> float:
        """Return the most device bytes that a step takes beside the states, activations left out."""
        gathered = self.whole_step * min(held, self.at_a_time)
        update = UPDATE_BYTES if self.own_state or self.whole_state else 0
        return self.temporary + max(gathered, self.own_step * own + update)

    def host(self, own: float) -> float:
        """Return the bytes of host memory of a rank that updates so many parameters."""
        return self.own_host * own + self.host_buffers(own)

    def host_buffers(self, own: float) -> float:
        """Return those of them that are buffers for files, all locked, whatever the size of the model.

        Besides, with weights in files, slices of two layers and of what is outside of layers.
        """
        return self.buffered * min(own, self.sub_group)

    def files(self, own: float) -> float:
        """Return the bytes of files of a rank that updates so many parameters, with those of a checkpoint."""
        return (self.own_file + self.own_staged) * own


def zero_bytes(settings: DeepSpeedConfig, precision: Precision) -> ZeroBytes:
    """Count the bytes of a stage of ZeRO with its offload.

    Example: bf16 over N ranks, on the device: stage 1 takes 6 + 12 / N, stage 2 takes 2 + 16 / N, stage 3
    takes 18 / N; with the optimizer in host memory stage 2 takes 2, and 18 / N there. A dense model of 70B on
    256 ranks with stage 3: 4.9 GB each, besides the layers at hand.

    The same with all of it in files: 0 on the device, 4 / N for gradients and 0.7 GB of buffers on the host,
    14 / N in files and as much again while a checkpoint is saved. A sub-group is larger by at most the slice
    of one parameter.

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
        host = {Offload.none: 0.0, Offload.cpu: state + _GRADIENT, Offload.nvme: _GRADIENT}
        is_swapped = settings.offload_optimizer is Offload.nvme
        in_files = settings.offload_param is Offload.nvme
        moved = (state if is_swapped else 0.0) + (weight if in_files else 0.0)
        return ZeroBytes(
            own_weight=weight if settings.offload_param is Offload.none else 0.0,
            own_gradient=0.0 if is_moved else _GRADIENT,
            own_state=0.0 if is_moved else state,
            own_host=host[settings.offload_optimizer]
            + (weight if settings.offload_param is Offload.cpu else 0.0),
            own_file=moved,
            own_staged=_WEIGHT + _MOMENTS + weight if moved else 0.0,
            sub_group=sub_group_size(settings) if moved else 0,
            whole_step=0.0 if in_files else weight,
            at_a_time=_GATHERED,
            buffered=(STATE_BUFFERS * _WEIGHT if is_swapped else 0.0) + (weight if in_files else 0.0),
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
            keeps_gradients=False,
        )
    is_flat = stage == 1 and precision is Precision.bf16
    return ZeroBytes(
        whole_weight=weight,
        whole_gradient=_GRADIENT if stage == 1 else 0.0,
        own_gradient=0.0 if is_flat else _GRADIENT,
        own_state=state,
        temporary=0 if is_flat else bucket,
        whole_step=_GRADIENT if is_flat else 0.0,
        own_step=0.0 if is_flat else _GRADIENT,
        keeps_gradients=is_flat,
    )

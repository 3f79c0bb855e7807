"""Describe engine=deepspeed: what it partitions, where it keeps that, and what goes to DeepSpeed as it is."""

from dataclasses import dataclass, field
from typing import Any

from msa_train.config.options import Offload


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """Set engine=deepspeed; the other engines do not look at it. Sizes are numbers of elements."""

    zero_stage: int = 2
    "what ranks partition: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights"
    offload_optimizer: Offload = Offload.none
    "where fp32 weights, moments and the update are; needs zero_stage 1 or more"
    offload_param: Offload = Offload.none
    "where this rank's part of the weights is kept; needs zero_stage=3"
    nvme_path: str = ""
    "folder on a local NVMe disk, for nvme"
    reduce_bucket_size: int = 50_000_000
    "gradients that are reduced at a time; 4 bytes each"
    allgather_bucket_size: int = 50_000_000
    "updated weights that are gathered at a time, with zero_stage 1 and 2; even"
    overlap_comm: bool = False
    "reduce gradients, and with zero_stage=3 gather weights, beside the computing"
    prefetch_bucket_size: int = 50_000_000
    "zero_stage=3: weights that are gathered before they are needed"
    param_persistence_threshold: int = 100_000
    "zero_stage=3: weights up to this size stay on every rank"
    raw: dict[str, Any] = field(default_factory=dict[str, Any])
    "more of DeepSpeed's own JSON, merged in last; refused where it contradicts what is set here"

    @property
    def uses_nvme(self) -> bool:
        """Tell whether anything is in files."""
        return Offload.nvme in (self.offload_optimizer, self.offload_param)

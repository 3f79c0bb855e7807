"""Count the bytes of a rank by part, by closed formulas; `msa_train.plan.trace` counts the real step.

Parts add up to the peak of the device. Weights, gradients and optimizer are exact; what a step keeps and
computes with is counted for the layer that needs most, as the rest of its layers keep their inputs alone.

Symbols: T tokens of a rank, H hidden size, M KV heads and Hq query heads of a rank, D head dim, Di index head
dim, S sequence length.
"""

from dataclasses import dataclass

from msa_train.config import AttentionKind, KvExchange, Precision, Recompute, RunConfig
from msa_train.plan import layer_memory
from msa_train.plan.assumptions import Assumptions
from msa_train.plan.optimizer_memory import state_bytes
from msa_train.plan.stage_parameters import RankParameters, stage_parameters
from msa_train.plan.stages import Stages

DEVICE_PARTS = (
    *("weights", "gradients", "optimizer", "kept activations", "step: attention", "step: experts"),
    *("index keys", "fetched keys and values", "logits", "checkpoint staging"),
)
HOST_PARTS = ("optimizer", "kept activations", "checkpoint staging")


@dataclass(slots=True)
class RankMemory:
    """Hold bytes of one rank by part."""

    device: dict[str, float]
    "on the GPU; they add up to its peak"
    host: dict[str, float]
    "in host memory"
    parameters: RankParameters
    "that the rank holds"

    @property
    def peak(self) -> float:
        """Return the peak of the device, margins left out."""
        return sum(self.device.values())

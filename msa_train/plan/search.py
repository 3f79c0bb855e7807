"""Search layouts and memory switches for those that fit a number of GPUs, the fastest first.

Formulas alone decide what fits, in microseconds each; only what fits is timed. For m3 on 256 GPUs about 20,000
candidates are counted and some hundred timed, in about a minute, most of it the simulation of some twenty
attention layers, which the candidates share.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from msa_train.config import Recompute, RunConfig, check_rules
from msa_train.plan.assumptions import Assumptions
from msa_train.plan.layer_time import LayerTimes, Machine
from msa_train.plan.memory import RankMemory, rank_memory
from msa_train.plan.stages import Stages, stages_of
from msa_train.plan.step_time import StepTime, step_time
from msa_train.simulate.study import Answer

_POWERS = [2**n for n in range(11)]


@dataclass(slots=True)
class Plan:
    """Hold one layout with its memory and time."""

    config: RunConfig
    "with all sizes and switches"
    world_size: int
    "ranks of the job"
    stages: Stages
    "layers of every pipeline stage"
    memory: list[RankMemory]
    "of the fullest rank of every stage"
    time: StepTime | None = None
    "of a step; None: not asked"

    @property
    def peak(self) -> float:
        """Return the bytes of the fullest stage."""
        return max(memory.peak for memory in self.memory)

"""Say which layers each pipeline rank has, whatever chunks they come in."""

from dataclasses import dataclass

from msa_train.config import RunConfig
from msa_train.config.pipeline import PipelineLayout, resolve_layout


@dataclass(slots=True, frozen=True)
class Stages:
    """Hold layers by pipeline rank."""

    layers: list[list[int]]
    "of each rank, from 0 on, those of all its chunks"
    chunks: int = 1
    "model chunks of a rank"


def stages_of(layout: PipelineLayout) -> Stages:
    """List the layers of every rank of a layout.

    Example: sizes 1, 1, 2, 2 on two ranks -> rank 0 has layers 0, 2, 3 and rank 1 has 1, 4, 5.
    """
    ranks = range(layout.pp_size)
    chunks = range(layout.num_chunks)
    layers = [[layer for chunk in chunks for layer in layout.layers(rank, chunk)] for rank in ranks]
    return Stages(layers, layout.num_chunks)


def stages_of_run(config: RunConfig, world_size: int) -> Stages:
    """List the layers of every rank of a run, as `parallel.pp_layout` says."""
    return stages_of(resolve_layout(config, world_size))

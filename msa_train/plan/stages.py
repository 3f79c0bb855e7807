"""Say which layers each pipeline rank has, chunk by chunk, and what is in flight."""

from dataclasses import dataclass

from msa_train.config import RunConfig
from msa_train.config.pipeline import PipelineLayout, resolve_layout


@dataclass(slots=True, frozen=True)
class Stages:
    """Hold layers by pipeline rank and model chunk."""

    chunks: list[list[list[int]]]
    "[ranks][chunks] layers from 0 on"

    @property
    def num_chunks(self) -> int:
        """Return the model chunks of a rank."""
        return len(self.chunks[0])

    @property
    def layers(self) -> list[list[int]]:
        """Return the layers of every rank, those of all its chunks."""
        return [[layer for chunk in rank for layer in chunk] for rank in self.chunks]


def stages_of(layout: PipelineLayout) -> Stages:
    """List the layers of every rank of a layout.

    Example: sizes 1, 1, 2, 2 on two ranks -> rank 0 has layers [0] and [2, 3], rank 1 has [1] and [4, 5].
    """
    chunks = range(layout.num_chunks)
    return Stages([[list(layout.layers(rank, n)) for n in chunks] for rank in range(layout.pp_size)])


def stages_of_run(config: RunConfig, world_size: int) -> Stages:
    """List the layers of every rank of a run, as `parallel.pp_layout` says."""
    return stages_of(resolve_layout(config, world_size))


def in_flight(pp_size: int, rank: int, num_chunks: int, num_micro: int) -> list[int]:
    """Count the micro-batches whose activations a rank holds at most, for each of its chunks.

    Megatron's 1F1B runs pp_size - rank - 1 forward passes ahead. Interleaved it runs ahead by twice that and
    by pp_size for each chunk but the last, taking pp_size micro-batches through one chunk, then through the
    next.

    Example: 4 ranks, 8 micro-batches: 4, 3, 2, 1 by rank; with 2 chunks rank 0 holds [7, 4], rank 3 [4, 1].
    """
    if num_chunks == 1:
        return [min(pp_size - rank, num_micro)]
    left = min((pp_size - rank - 1) * 2 + (num_chunks - 1) * pp_size + 1, num_micro * num_chunks)
    held = [0] * num_chunks
    chunk = 0
    while left > 0:
        taken = min(pp_size, left)
        held[chunk] += taken
        left, chunk = left - taken, (chunk + 1) % num_chunks
    return held

"""Say which layers a pipeline stage has."""

from dataclasses import dataclass

from msa_train.config import RunConfig


@dataclass(slots=True, frozen=True)
class Stages:
    """Hold layers by stage; with interleaving a rank has several runs of layers."""

    layers: list[list[int]]
    "by stage, from 0 on, in the order in which a micro-batch meets them"
    chunks: int = 1
    "model chunks of a rank"

    def of_rank(self, stage: int) -> list[int]:
        """List the layers of a stage."""
        return self.layers[stage]

    def all_layers(self) -> list[list[int]]:
        """List the layers of all stages."""
        return self.layers


def even_stages(config: RunConfig) -> Stages:
    """Cut the layers evenly: 60 layers over 4 stages -> 0 to 14, 15 to 29 and so on."""
    size = config.model.num_layers // config.parallel.pp_size
    return Stages([list(range(s * size, (s + 1) * size)) for s in range(config.parallel.pp_size)])


def counted_stages(counts: list[int], pp_size: int) -> Stages:
    """Cut the layers by numbers; with k * pp_size numbers, run i belongs to stage i % pp_size.

    Example: [1, 1, 2, 2] and pp_size 2 -> stage 0 has layers 0, 2, 3 and stage 1 has 1, 4, 5.
    """
    layers: list[list[int]] = [[] for _ in range(pp_size)]
    first = 0
    for index, count in enumerate(counts):
        layers[index % pp_size] += range(first, first + count)
        first += count
    return Stages(layers, len(counts) // pp_size)

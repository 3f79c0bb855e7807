"""Say which rank is traced, and state what a trace cannot know: numbers that follow from the data."""

from dataclasses import dataclass

from msa_train.config import RunConfig


@dataclass(kw_only=True, slots=True, frozen=True)
class Assumptions:
    """Hold numbers that decide sizes and follow from data; printed beside every figure that they lead to."""

    fetched_share: float = 0.2
    "f: remote KV blocks that a rank fetches, of all remote ones"
    expert_imbalance: float = 1.3
    "rows that the experts of this rank receive, relative to the mean over ranks"
    documents: tuple[int, ...] = ()
    "tokens of each document of a pack; none: one document of the whole length"
    ranks_per_machine: int = 8
    "for exchange.ranks_per_node=-1, which asks the launcher"
    micro_batches: int = 0
    "micro-batches of a step; 0: as many as fill the pipeline from this stage on"


@dataclass(kw_only=True, slots=True, frozen=True)
class Place:
    """Say which rank of the layout is traced."""

    pp_rank: int = 0
    "pipeline stage"
    cp_rank: int = -1
    "context-parallel rank; -1: the last, whose queries see most keys"
    dp_rank: int = 0
    "data-parallel rank"
    tp_rank: int = 0
    "tensor-parallel rank"


def rank_of(config: RunConfig, world_size: int, place: Place) -> int:
    """Number the rank at a place, in Megatron's order tp, cp, dp, pp.

    Example: 256 ranks, pp 4, cp 64: stage 1, cp_rank 63 -> 127.
    """
    parallel = config.parallel
    dp_size = world_size // (parallel.tp_size * parallel.cp_size * parallel.pp_size)
    cp_rank = place.cp_rank % parallel.cp_size
    return (
        (place.pp_rank * dp_size + place.dp_rank) * parallel.cp_size + cp_rank
    ) * parallel.tp_size + place.tp_rank

"""State what a trace cannot know: how much is fetched, how uneven the experts are, how documents lie."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class Assumptions:
    """Hold numbers that decide sizes and follow from data; printed beside every figure that they lead to."""

    fetched_share: float = 0.2
    "f: remote KV blocks that a rank fetches, of all remote ones"
    expert_imbalance: float = 1.3
    "rows that the experts of this rank receive, relative to the mean over ranks"
    documents: tuple[int, ...] = ()
    "tokens of each document of a pack; none: one document of the whole length"
    micro_batches: int = 0
    "micro-batches of a step; 0: as many as fill the pipeline from this stage on, and one more"

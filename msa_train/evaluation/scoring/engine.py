"""Say what an evaluation needs of an engine, so that this package needs to know no training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from msa_train.config import RunConfig, Stage
from msa_train.data import Pack
from msa_train.model.gpt import MsaGptModel
from msa_train.model.head_observer import HeadObserver
from msa_train.model.pack_forward import PackForward
from msa_train.parallel.process_groups import Groups


class EvaluatedEngine(Protocol):
    """Run packs without gradients; every TrainEngine does."""

    config: RunConfig
    "of the run"
    groups: Groups
    "this rank's place"
    forward: PackForward
    "plans packs"
    chunks: list[MsaGptModel]
    "this rank's parts of the model, in the order of the layers"

    @property
    def stage(self) -> Stage:
        """Return the stage whose attention and rotary embedding are used."""
        ...

    def evaluate(self, packs: Sequence[Pack]) -> float:
        """Run packs through the model; all ranks call it with equally many."""
        ...

    def counts_loss(self) -> bool:
        """Tell whether this rank's figures are to be added up with those of others."""
        ...


@contextmanager
def observed(engine: EvaluatedEngine, *, predicts: bool) -> Iterator[HeadObserver]:
    """Let an observer take the place of the loss on the last chunk; other stages leave it without records."""
    observer = HeadObserver(predicts=predicts)
    model = engine.chunks[-1]
    model.observer = observer
    try:
        yield observer
    finally:
        model.observer = None


def dealt(count: int, groups: Groups) -> list[int]:
    """Return which of `count` packs this data-parallel rank runs; all run equally many, for collectives.

    Example: 5 packs on 2 ranks: rank 0 runs 0, 2, 4, rank 1 runs 1, 3, 4; the last 4 is its surplus.
    """
    rounds = -(-count // groups.dp_size)
    return [min(i * groups.dp_size + groups.dp_rank, count - 1) for i in range(rounds)]


def is_surplus(turn: int, count: int, groups: Groups) -> bool:
    """Tell whether the pack of a turn is run only so that collectives pair up."""
    return turn * groups.dp_size + groups.dp_rank >= count

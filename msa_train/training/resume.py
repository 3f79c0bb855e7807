"""Bring a run to the state of its newest sound checkpoint."""

import re
from dataclasses import dataclass, field
from typing import Any

from msa_train.checkpoint.find import ResumePoint
from msa_train.checkpoint.load import load_checkpoint, load_newest, load_weights
from msa_train.checkpoint.torch_dist.format_versions import optimizer_updates
from msa_train.checkpoint.torch_dist.rng_state import RNG_KEY, set_rng_state
from msa_train.config import RunConfig
from msa_train.training.engines.engine import TrainEngine


@dataclass(slots=True)
class Resumed:
    """Hold where a run begins."""

    step: int
    "updates already made"
    messages: list[str]
    "lines to print"
    bad_steps: dict[str, Any] = field(default_factory=dict[str, Any])
    "what SkipPolicy had recorded; empty where the run begins"


def resume(config: RunConfig, engine: TrainEngine) -> Resumed:
    """Load the newest sound checkpoint, if any. All ranks call it.

    The run's own checkpoint comes first, else `checkpoint.load`.

    Args:
        config: the run.
        engine: takes the state over; as it was built where there is no checkpoint.

    Raises:
        ValueError: if there are checkpoints and none can be used, or they are of another model.
        CheckpointError: if one cannot be read.
    """
    lacking: set[str] = set()

    def load(found: ResumePoint) -> None:
        # a model with more MSA layers than the checkpoint's keeps new index branches as they were drawn
        if found.weights_only:
            template = engine.sharded_state(loading=True)["model"]
            weights, not_there = load_weights(found.path, template)
            engine.load_weights(weights)
            lacking.update(not_there)
        else:
            restore(found, engine)

    # tries older ones where the newest is damaged or not finite, so `load` may be called again
    found = load_newest(config, load)
    if found is None:
        return Resumed(0, [])
    # the bad steps of the other run are none of this one's
    if found.weights_only:
        lines = [*found.messages, f"starting from the weights of {found.path}", *_new_branches(lacking)]
        return Resumed(0, lines)
    origin = "" if found.own else f" of {found.path}"
    lines = [*found.messages, f"going on from step {found.step}{origin}"]
    return Resumed(found.step, lines, found.meta.get("bad_steps", {}))


def _new_branches(lacking: set[str]) -> list[str]:
    """Say which layers, counted from 1, have an index branch that the checkpoint lacks."""
    layers = sorted({int(match[1]) + 1 for key in lacking if (match := re.search(r"layers\.(\d+)\.", key))})
    return [f"it has no index branch in layers {', '.join(map(str, layers))}: drawn anew"] if layers else []


def restore(found: ResumePoint, engine: TrainEngine) -> None:
    """Bring model, optimizer and, where as many ranks saved, random numbers back to a checkpoint. All ranks.

    The learning rate and the place in the data need nothing: both follow from the step.

    Args:
        found: the checkpoint.
        engine: takes the state over.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    state = load_checkpoint(found.path, engine.sharded_state(loading=True))
    engine.load_state(state, optimizer_updates(found.meta))
    if RNG_KEY in state:
        set_rng_state(state[RNG_KEY])

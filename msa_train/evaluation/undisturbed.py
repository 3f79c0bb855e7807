"""Leave a training as it was: an evaluation draws no random number of it and counts no token."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from msa_train.evaluation.scoring.engine import EvaluatedEngine


@contextmanager
def undisturbed(engine: EvaluatedEngine) -> Iterator[None]:
    """Bring back random numbers, routers' counts and modes of modules when the block ends, to the bit.

    The optimizer is not touched: nothing here has gradients. Beside them 8 bytes per expert and layer, and 5
    KB of generators' states, are kept.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = engine.groups.device
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    counts = [(tensor, tensor.clone()) for tensor in _router_counts(engine)]
    modes = [(module, module.training) for chunk in engine.chunks for module in chunk.modules()]
    try:
        with torch.no_grad():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)
        for tensor, before in counts:
            tensor.copy_(before)
        for module, training in modes:
            module.training = training


def _router_counts(engine: EvaluatedEngine) -> list[Tensor]:
    """List what routers count and learn from it: tokens of experts, and their bias."""
    modules: list[nn.Module] = [module for chunk in engine.chunks for module in chunk.modules()]
    found = [
        getattr(module, name, None)
        for module in modules
        for name in ("local_tokens_per_expert", "expert_bias")
    ]
    return [one for one in found if isinstance(one, Tensor)]

"""Save and restore the random number generators of a process, a few KB of a checkpoint."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject

RNG_KEY = "rng_state"


def rng_state() -> dict[str, Any]:
    """Return the state of this process's generators: Python, NumPy, torch, and CUDA's current device.

    Tensors and plain values only, since nothing else is read from a checkpoint.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": {
            "kind": str(kind),
            "keys": torch.tensor(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Bring the generators back to what `rng_state` saw."""
    random.setstate(state["python"])
    # saved as int64, since torch has no arithmetic of uint32
    numpy_state = state["numpy"]
    keys = numpy_state["keys"].numpy().astype(np.uint32)
    np.random.set_state(
        (numpy_state["kind"], keys, numpy_state["position"], numpy_state["has_gauss"], numpy_state["cached"])
    )
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def rng_shard(state: dict[str, Any] | None) -> ShardedObject:
    """Wrap this rank's generators, to be saved or (None) to be loaded by as many ranks as saved them."""
    return ShardedObject(RNG_KEY, state, (dist.get_world_size(),), (dist.get_rank(),))

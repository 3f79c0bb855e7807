"""Leave out of checkpoints what modules keep beside weights, so that implementations can be exchanged.

Transformer Engine's modules add an `_extra_state` to their state: scales of fp8, which no run here uses, and
otherwise nothing, in a form that changes with its version. Megatron's linear layers in torch add an empty one
under the same names, norms in torch none. So entries of linear layers stay, empty, and all others go: what
one implementation has saved the other one loads, and files are the same.

Cost: none beside torch's. Transformer Engine's own would be an object of some bytes for each module.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

_SUFFIX = "_extra_state"


def without_extra_states(state: dict[str, Any]) -> dict[str, Any]:
    """Empty the extra states of linear layers and drop all others, in checkpoint entries by module name."""
    kept: dict[str, Any] = {}
    for name, entry in state.items():
        if name.endswith(_SUFFIX):
            weight = state.get(f"{name.removesuffix(_SUFFIX)}weight")
            if not isinstance(entry, ShardedObject) or weight is None or weight.data.dim() != 2:
                continue
            entry.data = None
        kept[name] = entry
    return kept


def load_without_extra_states(
    load: Callable[..., Any], state: Mapping[str, Any], *, strict: bool, assign: bool
) -> Any:
    """Load by a module's `load_state_dict`, strictly but for extra states, which stay as they are.

    Raises:
        RuntimeError: strict, and other entries are missing or left over, or shapes differ.
    """
    wanted = {name: entry for name, entry in state.items() if not name.endswith(_SUFFIX)}
    found = load(wanted, strict=False, assign=assign)
    missing = [name for name in found.missing_keys if not name.endswith(_SUFFIX)]
    if strict and (missing or found.unexpected_keys):
        raise RuntimeError(f"state lacks {missing} and has {list(found.unexpected_keys)} beside the model's")
    return found

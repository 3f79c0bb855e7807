"""Name the linear layers and norms that the model is built of: torch's, or Transformer Engine's.

Transformer Engine's are Megatron's wrappers, which take the same arguments and keep weights under the same
names. Experts, the index branch and the norms of heads stay ours: grouped products, a detached input and
fused rotation need them. Its grouped linear layer is not taken: it keeps all experts' weights in one module
under names of its own, and `GroupedExperts` computes the gradients of a tile from the tile's input alone.
The package is no dependency, and none of this has run with it.
"""

from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from msa_train.config import Implementation
from msa_train.model.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class LayerClasses:
    """Hold the classes that a layer's spec names."""

    column: type
    "linear layer cut by column over tensor-parallel ranks"
    row: type
    "linear layer cut by row"
    norm: Any
    "of a layer's input; called with config, hidden_size and eps"


def layer_classes(implementation: Implementation) -> LayerClasses:
    """Return the classes of an implementation.

    Raises:
        ValueError: Transformer Engine is asked for and not installed.
    """
    if implementation is Implementation.torch:
        return LayerClasses(ColumnParallelLinear, RowParallelLinear, RMSNorm)
    # its import is Megatron's, which puts stand-ins where the package is missing
    from megatron.core.extensions import transformer_engine as te

    if not te.HAVE_TE:
        raise ValueError(
            "model.implementation=transformer_engine: the transformer-engine package cannot be imported; "
            "install it, or use model.implementation=torch"
        )
    return LayerClasses(te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm)

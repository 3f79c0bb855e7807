"""Let ZeRO-3 gather weights where our model reads them.

DeepSpeed gathers the weights of a module before that module's forward pass and lets them go after it. Our
layers read weights outside of that: experts put theirs into one tensor, tiles and recomputation read them
again in the backward pass, offloaded activations tell weights by their memory. So DeepSpeed is told that a
transformer layer is one unit: all of its weights are there from before its forward pass to the end of it, and
again from before its backward pass to the end of that.

Kept at a time, in bf16, by arithmetic: a layer and what prefetch_bucket_size allows of the next ones; of a
70B model with 80 layers 1.75 GB and 0.1 GB. The output weight is there for the whole pass: 2.4 GB for 200,064
words and H = 6,144.
"""

from torch import nn

from msa_train.model.gpt import MsaGptModel
from msa_train.model.transformer_layer import MsaTransformerLayer


def gather_whole_layers(model: nn.Module) -> None:
    """Make transformer layers the units of gathering; before DeepSpeed takes the model."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, [MsaTransformerLayer])


def register_output_weight(model: MsaGptModel) -> None:
    """Say that the model itself reads the output weight, for the loss; once DeepSpeed has the model."""
    from deepspeed.runtime.zero import register_external_parameter

    shared = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if shared else model.output_layer.weight
    register_external_parameter(model, weight)

"""Count the bytes of weights, gradients and optimizer state that a layer brings to a GPU, by arithmetic."""

from dataclasses import replace

from msa_train.config.model_size import model_size
from msa_train.config.optimizer_bytes import optimizer_bytes
from msa_train.config.run import RunConfig


def layer_bytes(config: RunConfig, world_size: int) -> list[float]:
    """Count the bytes per GPU of each layer, the embedding with the first, the output layer with the last.

    Weights and gradients are on every rank that has the layer; Megatron's distributed optimizer divides its
    states over the data-parallel ranks, of experts over the ranks with the same ones.

    Example: M3 on 256 GPUs with pp 4, cp 64 and ep 64: 3.1 GB for an MSA layer, of which 2.0 are experts; 2.1
    GB for a full-attention layer; 7.6 GB each for embedding and output layer.
    """
    model, parallel = config.model, config.parallel
    stage = world_size // parallel.pp_size
    each = optimizer_bytes(config.optim, config.train.precision)
    per_dense, per_expert = (
        (each.unsharded + each.state / (stage / size)) / size for size in (parallel.tp_size, parallel.ep_size)
    )
    result: list[float] = []
    for number, kind in enumerate(model.attention_kinds()):
        # a model of this one layer, less its embedding and output
        one = replace(
            model,
            num_layers=1,
            layer_attention=kind.value,
            num_dense_ffn_layers=int(number < model.num_dense_ffn_layers),
            tie_embeddings=True,
        )
        size = model_size(one, config.attention)
        dense = size.total - size.experts - model.vocab_size * model.hidden_size
        result.append(dense * per_dense + size.experts * per_expert)
    embedding = model.vocab_size * model.hidden_size * per_dense
    result[0] += embedding
    result[-1] += 0 if model.tie_embeddings else embedding
    return result

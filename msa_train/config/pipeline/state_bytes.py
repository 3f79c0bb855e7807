"""Count the bytes of weights, gradients and optimizer state that a layer brings to a GPU, by arithmetic."""

from dataclasses import replace

from msa_train.config.model_size import model_size
from msa_train.config.run import RunConfig

_COPY_BYTES, _OPTIMIZER_BYTES = 6, 12
"of a parameter: bf16 weight and fp32 gradient on every rank that holds it; fp32 weight and moments, divided"


def layer_bytes(config: RunConfig, world_size: int) -> list[float]:
    """Count the bytes per GPU of each layer, the embedding with the first, the output layer with the last.

    Weights of 2 bytes and gradients of 4 are on every rank that has the layer; Megatron's distributed
    optimizer divides its 12 bytes over the data-parallel ranks, of experts over the ranks with the same ones.

    Example: M3 on 256 GPUs with pp 4, cp 64 and ep 64: 3.1 GB for an MSA layer, of which 2.0 are experts; 2.1
    GB for a full-attention layer; 7.6 GB each for embedding and output layer.
    """
    model, parallel = config.model, config.parallel
    stage = world_size // parallel.pp_size
    per_dense = (_COPY_BYTES + _OPTIMIZER_BYTES / (stage / parallel.tp_size)) / parallel.tp_size
    per_expert = (_COPY_BYTES + _OPTIMIZER_BYTES / (stage / parallel.ep_size)) / parallel.ep_size
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

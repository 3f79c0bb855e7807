"""Count the FLOPs of a step in two ways: what is computed, and what others print for a model of this shape.

Both leave recomputation out. A product's backward pass has two products; attention's has five for its two.
"""

from msa_train.config import AttentionKind, RunConfig
from msa_train.simulate.inputs.layer_shape import BACKWARD_FACTOR, LayerShape

_PRODUCT_PASSES = 3.0
"a product forward, two backward"


def flops_per_token(config: RunConfig, num_docs: int, *, dense: bool) -> float:
    """Count the FLOPs of one token, forward and backward.

    Args:
        config: the run.
        num_docs: documents of equal length in a pack.
        dense: count every MSA layer as full causal attention without an index branch, as trainers print that
            do not know sparse attention; else what is computed.

    Example: m3, one document of 1M tokens: about 400 GFLOP sparsely and 3.9 TFLOP densely.
    """
    model = config.model
    shape = LayerShape.of(model, config.attention, trains_index=config.attention.kl_weight > 0)
    visible = config.data.seq_len / num_docs / 2
    total = _PRODUCT_PASSES * 2.0 * model.hidden_size * model.vocab_size
    for layer, kind in enumerate(model.attention_kinds()):
        total += _PRODUCT_PASSES * (shape.qkv_flops(1) + shape.output_flops(1) + _ffn(config, layer))
        if kind is AttentionKind.full or dense:
            total += (1 + BACKWARD_FACTOR) * shape.full_flops(visible)
        elif kind is AttentionKind.swa:
            total += (1 + BACKWARD_FACTOR) * shape.full_flops(min(visible, config.attention.window))
        else:
            total += _msa(shape, visible)
    return total


def _msa(shape: LayerShape, visible: float) -> float:
    """Count index branch and sparse attention of one token; scoring has no backward pass."""
    tiles = float(min(shape.topk, visible / shape.block_size))
    total = _PRODUCT_PASSES * shape.index_projection_flops(1) + shape.index_flops(visible)
    total += (1 + BACKWARD_FACTOR) * shape.sparse_flops(tiles)
    return total + (shape.kl_flops(tiles) if shape.trains_index else 0.0)


def _ffn(config: RunConfig, layer: int) -> float:
    """Count the forward FLOPs of one token in a layer's feed-forward part: three products."""
    model = config.model
    if layer < model.num_dense_ffn_layers:
        return 6.0 * model.hidden_size * model.ffn_hidden_size
    width = model.moe_router_topk * model.moe_ffn_hidden_size + model.shared_expert_hidden_size
    return 6.0 * model.hidden_size * width + 2.0 * model.hidden_size * model.num_experts

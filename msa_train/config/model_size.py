"""Count the parameters of a configuration, by arithmetic."""

from dataclasses import dataclass

from msa_train.config.model import AttentionConfig, ModelConfig
from msa_train.config.options import AttentionKind, QkNorm


@dataclass(kw_only=True, slots=True)
class ModelSize:
    """Hold numbers of parameters."""

    total: int
    "of the whole language model"
    active: int
    "of the layers, for one token: the chosen experts only; without embedding, output and index branch"
    experts: int
    "of the routed experts, which expert parallelism divides"


def model_size(model: ModelConfig, attention: AttentionConfig) -> ModelSize:
    """Count the parameters: embedding, attention, index branch, norms, feed-forward, experts and output.

    Example: one expert of m3 holds 3 matrices of 6144 x 3072, 56.6M parameters; 57 layers with 128 experts
    each are 413.1B of its 426.2B in all, and 23.3B are active. In bf16 the weights take 852 GB.
    """
    hidden, moe_layers = model.hidden_size, model.num_layers - model.num_dense_ffn_layers
    embedding = model.vocab_size * hidden
    output = 0 if model.tie_embeddings else embedding
    num_msa = model.attention_kinds().count(AttentionKind.msa)
    index = num_msa * _index_branch(model, attention)
    layers = model.num_layers * _attention(model)
    dense = model.num_dense_ffn_layers * 3 * hidden * model.ffn_hidden_size
    expert = 3 * hidden * model.moe_ffn_hidden_size
    # per expert a row of the router and a bias for balancing the load
    routers = moe_layers * model.num_experts * (hidden + 1)
    shared = moe_layers * 3 * hidden * model.shared_expert_hidden_size
    norms = (2 * model.num_layers + 1) * hidden
    rest = layers + dense + routers + shared + norms
    experts = moe_layers * model.num_experts * expert
    return ModelSize(
        total=embedding + output + index + rest + experts,
        active=rest + moe_layers * model.moe_router_topk * expert,
        experts=experts,
    )


def _attention(model: ModelConfig) -> int:
    # projections of queries and outputs (Hq heads each), of keys and values (M each); norms come on top
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    count = heads * model.head_dim * model.hidden_size
    if model.qk_norm is QkNorm.head:
        count += 2 * model.head_dim
    elif model.qk_norm is QkNorm.width:
        count += (model.num_heads + model.num_kv_heads) * model.head_dim
    return count


def _index_branch(model: ModelConfig, attention: AttentionConfig) -> int:
    """Count the index branch: one index query per KV head, one index key shared by all, each with a norm."""
    projections = (model.num_kv_heads + 1) * attention.index_head_dim * model.hidden_size
    return projections + 2 * attention.index_head_dim

"""Count the parameters that a rank of each pipeline stage holds, by arithmetic."""

from dataclasses import dataclass

from msa_train.config import AttentionConfig, AttentionKind, ModelConfig, ParallelConfig, QkNorm


@dataclass(kw_only=True, slots=True, frozen=True)
class RankParameters:
    """Hold numbers of parameters of one rank."""

    dense: int
    "all but routed experts; the same on all ranks of data and context parallelism"
    experts: int
    "of the routed experts that this rank holds"

    def __add__(self, other: "RankParameters") -> "RankParameters":
        return RankParameters(dense=self.dense + other.dense, experts=self.experts + other.experts)


def layer_parameters(
    model: ModelConfig, attention: AttentionConfig, parallel: ParallelConfig, layer: int
) -> RankParameters:
    """Count one layer, from 0 on, on one rank.

    Tensor parallelism cuts projections, feed-forward networks and the shared expert; norms, router and index
    key are whole on every rank.

    Example: an MSA layer of m3 with ep 64 and tp 1: 168M dense parameters and two experts of 56.6M.
    """
    hidden, tp_size = model.hidden_size, parallel.tp_size
    cut = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim * hidden
    # norms before attention and feed-forward network
    whole = 2 * hidden
    if model.qk_norm is QkNorm.head:
        whole += 2 * model.head_dim
    elif model.qk_norm is QkNorm.width:
        whole += (model.num_heads + model.num_kv_heads) * model.head_dim
    if model.attention_kinds()[layer] is AttentionKind.msa:
        # an index query per KV head, and a key that all heads share, each with a norm
        cut += model.num_kv_heads * attention.index_head_dim * hidden
        whole += attention.index_head_dim * hidden + 2 * attention.index_head_dim
    experts = 0
    if layer < model.num_dense_ffn_layers:
        cut += 3 * hidden * model.ffn_hidden_size
    else:
        cut += 3 * hidden * model.shared_expert_hidden_size
        whole += model.num_experts * hidden
        experts = 3 * hidden * model.moe_ffn_hidden_size * model.num_experts // parallel.ep_size
    return RankParameters(dense=cut // tp_size + whole, experts=experts)


def stage_parameters(
    model: ModelConfig,
    attention: AttentionConfig,
    parallel: ParallelConfig,
    stages: list[list[int]],
    stage: int,
) -> RankParameters:
    """Count one pipeline stage on one rank; the first has the embedding, the last the output and its norm.

    Args:
        model: shape of the model.
        attention: its index branch.
        parallel: sizes of the groups.
        stages: layers of every stage, from 0 on.
        stage: which.
    """
    total = RankParameters(dense=0, experts=0)
    for layer in stages[stage]:
        total += layer_parameters(model, attention, parallel, layer)
    table = model.vocab_size * model.hidden_size // parallel.tp_size
    ends = table if stage == 0 else 0
    if stage == len(stages) - 1:
        ends += model.hidden_size + (0 if model.tie_embeddings and len(stages) == 1 else table)
    return total + RankParameters(dense=ends, experts=0)

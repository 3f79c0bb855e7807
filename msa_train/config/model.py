"""Describe the shape of the model and of its attention."""

import re
from dataclasses import dataclass

from msa_train.config.options import (
    Activation,
    AttentionKernel,
    AttentionKind,
    FullKernel,
    Implementation,
    QkNorm,
    RopeType,
)

_COUNT = re.compile("0*[1-9][0-9]{0,8}")
MAX_LAYERS = 10_000
"the attention of each is listed when a configuration is made"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Describe the architecture of a GQA + sigmoid-routed mixture-of-experts language model.

    Raises:
        ValueError: if a size is not positive, or sizes do not divide one another.
    """

    name: str = "tiny"
    "shown in what a run prints"
    num_layers: int = 3
    "transformer layers"
    hidden_size: int = 128
    "channels of the residual stream"
    num_heads: int = 4
    "query heads"
    num_kv_heads: int = 2
    "key/value heads; one MSA selection each; must divide num_heads"
    head_dim: int = 32
    "channels of a head"
    vocab_size: int = 512
    "rows of the embedding; at least the tokenizer's size"
    ffn_hidden_size: int = 256
    "width of the dense feed-forward layers"
    num_dense_ffn_layers: int = 1
    "the first layers have a dense feed-forward network instead of experts"
    num_experts: int = 8
    "routed experts of a layer"
    moe_router_topk: int = 2
    "experts of each token"
    moe_ffn_hidden_size: int = 64
    "width of one routed expert"
    shared_expert_hidden_size: int = 64
    "width of the shared expert, 0 for none"
    routed_scaling_factor: float = 1.0
    "factor on the sum of the routed experts' outputs"
    router_bias_update_rate: float = 1e-3
    "step of the auxiliary-loss-free expert bias; 0 freezes it"
    layer_attention: str = "full,msa"
    "attention per layer: full, msa or swa, comma-separated; `kind*n` repeats, the last one fills the rest"
    rotary_dim: int = 24
    "rotated channels of each head, the first ones; also of the index heads"
    rope_theta: float = 10.0
    "base of the rotary frequencies"
    rope_type: RopeType = RopeType.default
    "scaling of the rotary frequencies, of main attention and index branch alike"
    rope_factor: float = 1.0
    "how many times longer than before; 1 with rope_type=default"
    rope_original_length: int = 0
    "yarn: tokens of the length before the extension"
    rope_beta_fast: float = 0.0
    "yarn: a frequency with more turns than this within the original length stays; 0: 32"
    rope_beta_slow: float = 0.0
    "yarn: one with fewer turns is divided by the factor; 0: 1"
    rope_attention_factor: float = 0.0
    "yarn: factor on sine and cosine; 0: from the two below, or 0.1 * ln(rope_factor) + 1"
    rope_mscale: float = 0.0
    "yarn: numerator of that factor, 0.1 * rope_mscale * ln(rope_factor) + 1; 0: not used"
    rope_mscale_all_dim: float = 0.0
    "yarn: the same for its denominator"
    rope_truncate: bool = True
    "yarn: the ramp begins and ends at whole channels"
    qk_norm: QkNorm = QkNorm.head
    "RMS normalisation of queries and keys before the rotary embedding"
    norm_eps: float = 1e-6
    "added to the mean square in RMS normalisation"
    zero_centered_norm: bool = True
    "norm weights act as 1 + w, w initialised to 0 (Gemma style)"
    activation: Activation = Activation.swiglu_oai
    "of feed-forward layers and experts"
    implementation: Implementation = Implementation.torch
    "whose linear layers and norms; experts, index branch and norms of heads are ours either way"
    tie_embeddings: bool = False
    "one matrix for the embedding and the output"
    init_std: float = 0.05
    "standard deviation of initial weights; output projections of layers: / sqrt(2 * num_layers)"
    embedding_init_std: float = 0.15
    "the same of the token embedding"
    embedding_shared_std: float = 0.15
    "the same of one vector added to every token's embedding; 0 for none"

    def __post_init__(self) -> None:
        _positive(self, ["num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim"])
        _positive(self, ["vocab_size", "ffn_hidden_size", "num_experts", "moe_router_topk"])
        _positive(self, ["moe_ffn_hidden_size"])
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"model.num_layers={self.num_layers}: must be at most {MAX_LAYERS}; correct it")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads}: must divide model.num_heads={self.num_heads}"
            )
        if self.moe_router_topk > self.num_experts:
            raise ValueError(
                f"model.moe_router_topk={self.moe_router_topk}: must be at most "
                f"model.num_experts={self.num_experts}"
            )
        if not 0 <= self.num_dense_ffn_layers <= self.num_layers:
            raise ValueError(
                f"model.num_dense_ffn_layers={self.num_dense_ffn_layers}: must be from 0 to "
                f"model.num_layers={self.num_layers}"
            )
        # channels are rotated in pairs
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"model.rotary_dim={self.rotary_dim}: must be even and at most model.head_dim={self.head_dim}"
            )
        self.attention_kinds()

    def attention_kinds(self) -> list[AttentionKind]:
        """List the attention of each layer, e.g. "full*3,msa" with 5 layers -> [full, full, full, msa, msa].

        Raises:
            ValueError: for a kind that does not exist, or more layers than num_layers.
        """
        kinds: list[AttentionKind] = []
        # checked as it grows: a count with nine digits would fill the memory first
        for part in self.layer_attention.split(","):
            name, _, count = part.strip().partition("*")
            if name not in AttentionKind.__members__ or (count and not _COUNT.fullmatch(count)):
                raise ValueError(
                    f"model.layer_attention={self.layer_attention}: '{part}' is not one of "
                    f"{', '.join(AttentionKind.__members__)} with an optional '*count' from 1 on"
                )
            if len(kinds) + int(count or 1) > self.num_layers:
                raise ValueError(
                    f"model.layer_attention={self.layer_attention}: names more layers than "
                    f"model.num_layers={self.num_layers}; use fewer"
                )
            kinds += [AttentionKind[name]] * int(count or 1)
        return kinds + [kinds[-1]] * (self.num_layers - len(kinds))


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """Describe MiniMax Sparse Attention: block selection and its training; also sliding windows.

    Source: arXiv 2606.13392. A query of M3 attends to topk * block_size = 16 * 128 = 2048 tokens per KV head.

    Raises:
        ValueError: for values that are out of range.
    """

    block_size: int = 128
    "tokens per key block; also the alignment of documents in a pack"
    topk: int = 16
    "blocks that each query and KV head attends to, the local block included"
    local_blocks: int = 1
    "last blocks up to the query's own that are always selected; they use top-k slots"
    index_head_dim: int = 128
    "channels of an index query and of the index key"
    kl_weight: float = 1.0
    "factor of the KL loss, summed over layers, that trains the index branch; 0 freezes the branch"
    kl_temperature: float = 1.0
    "divides the logits of teacher and student in the KL loss; never changes the selection"
    window: int = 2048
    "tokens that a query of a sliding-window (swa) layer sees, itself included"
    window_sink: int = 0
    "first blocks of the document that every query of a sliding-window layer sees too; 0 for none"
    kernel: AttentionKernel = AttentionKernel.auto
    "what computes selection, sparse attention and all KL losses"
    full_kernel: FullKernel = FullKernel.auto
    "what computes full attention; auto: the fastest that is installed and works on the GPU"

    def __post_init__(self) -> None:
        _positive(self, ["block_size", "topk", "local_blocks", "index_head_dim"])
        if self.local_blocks > self.topk:
            raise ValueError(
                f"attention.local_blocks={self.local_blocks}: must be at most attention.topk={self.topk}"
            )
        if self.window < 1:
            raise ValueError(f"attention.window={self.window}: must be at least 1, the query itself")
        if self.window_sink < 0:
            raise ValueError(
                f"attention.window_sink={self.window_sink}: must not be negative; use 0 for none"
            )
        if self.kl_weight < 0:
            raise ValueError(f"attention.kl_weight={self.kl_weight}: must not be negative")
        _positive(self, ["kl_temperature"])


def _positive(config: object, names: list[str]) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            section = type(config).__name__.removesuffix("Config").lower()
            raise ValueError(f"{section}.{name}={getattr(config, name)}: must be positive")

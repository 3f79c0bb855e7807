"""Count the bytes that one layer keeps and computes with, by part.

Symbols: T tokens of a rank, H hidden size, M KV heads and Hq query heads of a rank, D head dim, Di index head
dim, S sequence length.
"""

from msa_train.config import AttentionKind, KvExchange, Precision, Recompute, RunConfig
from msa_train.config.recompute import recompute_modules
from msa_train.plan.assumptions import Assumptions


class LayerMemory:
    """Count the layers of one configuration."""

    def __init__(self, config: RunConfig, assumed: Assumptions) -> None:
        self.config, self.assumed = config, assumed
        model, parallel = config.model, config.parallel
        self.width = 2 if config.train.precision is Precision.bf16 else 4
        "bytes of an activation's number"
        self.tokens = config.data.seq_len // parallel.cp_size
        "T"
        self.hidden = self.tokens // parallel.tp_size * model.hidden_size * self.width
        "bytes of the hidden states of a rank"
        self.query = self.tokens * model.num_heads // parallel.tp_size * model.head_dim
        "numbers of the queries of a rank, whatever Ulysses groups trade"
        self.kv = self.tokens * model.num_kv_heads // parallel.tp_size * model.head_dim
        "numbers of the keys of a rank, the same of the values"

    @property
    def boundary(self) -> float:
        """Return the bytes of what a stage receives and hands on per micro-batch."""
        return float(self.hidden) if self.config.parallel.pp_size > 1 else 0.0

    def kept(self, layer: int, recompute: Recompute) -> float:
        """Count what a layer keeps from its forward to its backward pass."""
        model, attention = self.config.model, self.config.attention
        selected = self.tokens * model.num_kv_heads // self.config.parallel.tp_size * attention.topk * 4
        is_msa = model.attention_kinds()[layer] is AttentionKind.msa
        record = float(selected if is_msa else 0)
        if layer >= model.num_dense_ffn_layers:
            # routing: a bool per expert and an fp32 probability per token
            record += self.tokens * model.num_experts
        if recompute is Recompute.full:
            return self.hidden + record
        modules = recompute_modules(self.config) if recompute is Recompute.selective else frozenset[str]()
        kept = self.hidden + record + self._attention_kept(layer, modules)
        return kept + self._ffn_kept(layer, modules)

    def _attention_kept(self, layer: int, modules: frozenset[str]) -> float:
        """Count what attention keeps: norm, mixed and rotated q, k, v, its output and what was fetched."""
        kept = 0.0 if "norm" in modules else 2.0 * self.hidden
        kept += self.width * (3 * self.query + 4 * self.kv)
        if "attention" not in modules and self.config.exchange.keep_for_backward:
            kept += self._fetched_bytes(layer)
        return kept

    def _ffn_kept(self, layer: int, modules: frozenset[str]) -> float:
        """Count what experts or a dense network keep; tiles keep their input alone."""
        model = self.config.model
        module = "ffn" if layer < model.num_dense_ffn_layers else "experts"
        kept = float(self.hidden)
        if self.config.train.tile_tokens or module in modules:
            return kept
        if module == "ffn":
            return kept + 4.0 * self.tokens * model.ffn_hidden_size * self.width
        rows = self.tokens * model.moe_router_topk * self.assumed.imbalance
        return kept + rows * (2 * model.hidden_size + 4 * model.moe_ffn_hidden_size) * self.width

    def attention(self, layer: int) -> dict[str, float]:
        """Count the backward pass of attention, its recomputed forward included."""
        model, parallel = self.config.model, self.config.parallel
        kind = model.attention_kinds()[layer]
        parts: dict[str, float] = {}
        if kind is AttentionKind.msa:
            parts["index keys"] = float(
                self.config.data.seq_len * self.config.attention.index_head_dim * self.width
            )
        # keys and values that came, and their gradients in fp32
        fetched = self._fetched_bytes(layer)
        parts["fetched keys and values"] = fetched * (1 + 4 / self.width)
        # normed input, its gradient, mixed projections; q, out, dout in 16 bits; out and dq in fp32
        numbers = 4.0 * self.hidden + self.width * (5 * self.query + 6 * self.kv) + 4 * 2 * self.query
        parts["attention"] = numbers / 1
        del parallel
        return parts

    def _fetched_bytes(self, layer: int) -> float:
        """Count keys and values of other ranks that a rank holds at once."""
        config = self.config
        parallel, exchange = config.parallel, config.parallel.kv_exchange
        others = config.data.seq_len - self.tokens * parallel.cp_head_size
        row = (
            2
            * (config.model.num_kv_heads // parallel.tp_size // parallel.cp_head_size)
            * config.model.head_dim
        )
        kind = config.model.attention_kinds()[layer]
        if kind is AttentionKind.full or exchange is KvExchange.all_gather:
            return float(others * row * self.width)
        if exchange is KvExchange.ring:
            return 2.0 * self.tokens * row * self.width
        return self.assumed.f * others * row * self.width

    def feed_forward(self, layer: int) -> dict[str, float]:
        """Count the backward pass of experts or of a dense network, its recomputed forward included."""
        model, train = self.config.model, self.config.train
        tile = min(train.tile_tokens or self.tokens, self.tokens)
        hidden = tile * model.hidden_size * self.width
        around = 4.0 * self.hidden
        if layer < model.num_dense_ffn_layers:
            inner = 2 * model.ffn_hidden_size // self.config.parallel.tp_size * tile * self.width
            return {"experts": around + 2.0 * hidden + 4.0 * inner}
        rows = tile * model.moe_router_topk / self.config.parallel.tp_size
        fullest = rows * self.assumed.imbalance
        # rows sent and received and their gradients; in the experts gate and up, product, gradients
        buffers = (2 * rows + 4 * fullest) * model.hidden_size * self.width
        buffers += fullest * 6 * model.moe_ffn_hidden_size * self.width
        return {"experts": around + buffers}

    def head(self) -> dict[str, float]:
        """Count output and loss: hidden states and their gradient, logits, gradient of the weight."""
        model, parallel = self.config.model, self.config.parallel
        table = model.vocab_size // parallel.tp_size * model.hidden_size
        chunk = 1024 * (model.vocab_size // parallel.tp_size)
        tokens = 3.0 * self.tokens * model.hidden_size * self.width
        return {"logits": tokens + chunk * (4 + self.width) + table * (4.0 + self.width)}

"""Count the bytes that one layer keeps and computes with, by part.

Symbols: T tokens of a rank, H hidden size, M KV heads and Hq query heads of a rank, D head dim, Di index head
dim, S sequence length.
"""

import math

from msa_train.config import AttentionKind, KvExchange, Precision, Recompute, RunConfig
from msa_train.config.recompute import recompute_modules
from msa_train.plan.assumptions import Assumptions

_PORTION_BYTES = 2**32
"of partial gradients that the backward kernels take at a time, see launch_backward.py"

_TILE_BYTES, _TILE_ROWS = 2**28, 8192
"logits of one tile of the loss in fp32, and its rows, layers/cross_entropy.py"


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

    def record(self, layer: int) -> float:
        """Count the decisions of a layer, which stay on the device: selection, and experts of each token."""
        model, attention = self.config.model, self.config.attention
        record = 0.0
        if model.attention_kinds()[layer] is AttentionKind.msa:
            record += self.kv // model.head_dim * attention.topk * 4
        if layer >= model.num_dense_ffn_layers:
            # an id of 8 bytes and a probability of 4 for each choice
            record += self.tokens * model.moe_router_topk * 12
        return record

    def kept(self, layer: int, recompute: Recompute) -> float:
        """Count the activations that a layer keeps from its forward to its backward pass."""
        if recompute is Recompute.full:
            return float(self.hidden)
        modules = recompute_modules(self.config) if recompute is Recompute.selective else frozenset[str]()
        kept = self.hidden + self._attention_kept(layer, modules)
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
        """Count the backward pass of attention, its recomputed forward included.

        Beside what travels: mixed projections, hidden states, and rows of queries. Of these the sparse
        backward has two sums and the part of one pool in fp32, six copies in 16 bits, and partial gradients
        by pair.
        """
        rows = float(self.query * self.width)
        mixed = self.width * (self.query + 2 * self.kv)
        # as they came, their gradients in fp32 and on the wire; by nodes another time for the node
        hops = 2 if self.config.exchange.ranks_per_node else 1
        parts = {"fetched keys and values": self._fetched_bytes(layer) * hops * (2 + 4 / self.width)}
        if self.config.model.attention_kinds()[layer] is not AttentionKind.msa:
            # dq in fp32; q, out, dout and their moved copies
            parts["attention"] = mixed + 2 * self.hidden + 4.0 * self.query + 8 * rows
            return parts
        keys = self.config.data.seq_len * self.config.attention.index_head_dim
        parts["index keys"] = float(keys * self.width)
        sums = 4.0 * self.query * (2 + self._own_share)
        parts["attention"] = mixed + self.hidden + sums + 6 * rows + self._pair_bytes()
        return parts

    @property
    def _own_share(self) -> float:
        """Return the share of own gradients that is computed first, while a node adds up those of others."""
        return 0.75 if self.config.exchange.ranks_per_node else 1.0

    def _pair_bytes(self) -> float:
        """Count partial gradients of the queries by pair of the kernels, of one portion."""
        model, attention = self.config.model, self.config.attention
        group = model.num_heads // model.num_kv_heads * model.head_dim
        index = attention.block_size * 4 + attention.index_head_dim * self.width
        num_rows = self.query // group * self._own_share
        most = _PORTION_BYTES // (group * self.width + index) // attention.topk
        portion = num_rows / math.ceil(num_rows / most)
        return portion * attention.topk * (group * self.width + attention.block_size * 4.0)

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
        """Count output and loss: hidden states, their gradients, a tile of logits, a slice of weight."""
        model, parallel = self.config.model, self.config.parallel
        numbers = self.tokens * model.hidden_size
        # normed input, its gradient in fp32 and in 16 bits, logits and their gradient of one tile
        slice_rows = min(
            model.vocab_size // parallel.tp_size, _TILE_BYTES // 4 // min(self.tokens, _TILE_ROWS)
        )
        weight = slice_rows * model.hidden_size * (4.0 + self.width)
        return {"logits": numbers * (4.0 + 3 * self.width) + 2.0 * _TILE_BYTES + weight}

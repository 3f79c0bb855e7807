"""Price each layer of a model in seconds per token of a rank, at a given length of the documents.

Parts are FLOPs (a multiplication with its addition is 2) over rates. Per token, forward, for M3 at one
document of 1M tokens: a full-attention layer 17.2 GFLOP of attention, 0.2 of projections and 0.5 of its
dense network; an MSA layer 0.5 of index scores, 0.07 of sparse attention, 0.2 of projections and 0.6 of
experts; the output layer 2.5. So 3 full layers cost as much as 39 MSA layers forward, and more with the
backward pass, which has no index scores.

Symbols: L tokens of a document, H hidden size, Hq query heads, M KV heads, D head dim, Di index head dim.
"""

from dataclasses import dataclass, fields

from msa_train.config.model import ModelConfig
from msa_train.config.options import AttentionKind, KlTarget, StageAttention
from msa_train.config.recompute import recomputed_share
from msa_train.config.run import RunConfig
from msa_train.config.staging.stage import Stage
from msa_train.config.staging.views import stages_of_layout

_BACKWARD_GEMM, _BACKWARD_ATTENTION = 2.0, 2.5
"FLOPs of a backward pass relative to its forward pass: 2 products for 1, 5 products for 2"
_ELEMENT_BYTES = 2
"of activations on the wire, bf16"


@dataclass(kw_only=True, slots=True, frozen=True)
class LayerRates:
    """Hold how fast a device does the parts of a layer, FLOP/s, and the link that experts and KV blocks take.

    The defaults are those of `msa-simulate`'s h100_assumed: assumptions for an H100, none was measured here.
    """

    gemm: float = 690e12
    "of projections, dense networks, experts and the output layer"
    full_forward: float = 596e12
    "of full and sliding-window attention, forward"
    full_backward: float = 530e12
    "of the same, backward"
    scoring: float = 298e12
    "of index scores"
    sparse_forward: float = 298e12
    "of block-sparse attention, forward"
    sparse_backward: float = 265e12
    "of the same, backward"
    kl: float = 265e12
    "of the KL loss, in the backward pass"
    link_bytes: float = 50e9
    "bytes per second that a rank sends over the links of its node; 400 Gbit/s"
    selected_fraction: float = 0.2
    "f, share of the other ranks' KV blocks that the queries of a rank select; 0 to 1"

    @staticmethod
    def flops_only() -> "LayerRates":
        """Return rates that make prices FLOPs per token: all speeds 1 FLOP/s, nothing travels."""
        speeds = {item.name: 1.0 for item in fields(LayerRates)}
        return LayerRates(**speeds | {"link_bytes": float("inf"), "selected_fraction": 0.0})


@dataclass(kw_only=True, slots=True, frozen=True)
class Prices:
    """Hold prices of one token, forward and backward: seconds of a rank, or FLOPs with `flops_only`."""

    layers: list[float]
    "of each transformer layer, first to last"
    embedding: float
    "of the embedding, which is with the first layer"
    head: float
    "of the output layer and its loss, which are with the last layer"
    mtp: float = 0.0
    "of the multi-token prediction layers with their output layers, also with the last layer"

    def by_layer(self) -> list[float]:
        """Return the price of each layer with what must stand beside it: embedding, head and MTP."""
        prices = list(self.layers)
        prices[0] += self.embedding
        prices[-1] += self.head + self.mtp
        return prices


def layer_prices(
    config: RunConfig, doc_len: int | None = None, rates: LayerRates | None = None
) -> list[float]:
    """Price each layer, the embedding in the first and the output layer in the last: [num_layers] seconds.

    See `price_layers`.
    """
    return price_layers(config, doc_len, rates).by_layer()


def price_layers(
    config: RunConfig,
    doc_len: int | None = None,
    rates: LayerRates | None = None,
    *,
    backward: bool = True,
    num_mtp_layers: int = 0,
) -> Prices:
    """Price the parts of a model per token of a rank. Pure arithmetic, 0.1 ms for 60 layers.

    Args:
        config: of the run; its longest stage decides what MSA layers attend to.
        doc_len: tokens of a document; None: one document fills the longest pack.
        rates: of the device; None: those assumed of an H100.
        backward: the backward pass and recomputation too; false: forward alone.
        num_mtp_layers: multi-token prediction layers behind the last, each an MSA layer, a projection of two
            hidden states to one and an output layer of its own.

    Example: M3 at 1M tokens, forward, `LayerRates.flops_only()`: 17.9e9 for each of the three full layers,
    1.39e9 for an MSA layer, 2.46e9 for the head.
    """
    stage = longest_stage(config)
    work = _Work(config, stage, doc_len or stage.seq_len, rates or LayerRates(), backward)
    kinds = config.model.attention_kinds()
    layers = [work.layer(kind, number) for number, kind in enumerate(kinds)]
    hidden = config.model.hidden_size
    head = work.kept(2 * config.model.vocab_size * hidden)
    mtp = num_mtp_layers * (layers[-1] + head + work.kept(4 * hidden * hidden))
    # rows are copied, nothing is multiplied
    return Prices(layers=layers, embedding=0.0, head=head, mtp=mtp)


def longest_stage(config: RunConfig) -> Stage:
    """Return the stage with the longest packs among those of this layout, the last of several."""
    return max(stages_of_layout(config), key=lambda stage: (stage.seq_len, stage.index))


@dataclass(slots=True)
class _Work:
    """Price the layers of one run at one length."""

    config: RunConfig
    stage: Stage
    doc_len: int
    rates: LayerRates
    backward: bool

    def layer(self, kind: AttentionKind, number: int) -> float:
        """Price one layer; `number` counts from 0."""
        model = self.config.model
        sparse = kind is AttentionKind.msa and self.stage.attention is StageAttention.sparse
        price = self.gemm(_projection_flops(model))
        if sparse:
            price += self._sparse()
        elif kind is AttentionKind.swa:
            window = self.config.attention.window
            price += self._full(_mean_keys(self.doc_len, window))
        else:
            price += self._full(_mean_keys(self.doc_len, self.doc_len))
        if kind is AttentionKind.msa:
            price += self._index(sparse=sparse)
        if number < model.num_dense_ffn_layers:
            return price + self.gemm(6 * model.hidden_size * model.ffn_hidden_size, "ffn")
        return price + self._experts()

    def kept(self, flops: float) -> float:
        """Price a matrix product that is never recomputed."""
        return flops / self.rates.gemm * (1 + _BACKWARD_GEMM * self.backward)

    def gemm(self, flops: float, part: str = "") -> float:
        """Price a matrix product of a layer; part: see `_recomputed`."""
        return self.kept(flops) + flops / self.rates.gemm * self._recomputed(part)

    def _recomputed(self, part: str) -> float:
        """Return how often a part of a layer is computed again, as a mean over pipeline ranks: 0 to 1.

        Args:
            part: of MODULES of `msa_train.config.recompute`; "": what only `full` computes again.
        """
        return recomputed_share(self.config, part) if self.backward else 0.0

    def _attention(self, flops: float, forward: float, backward: float) -> float:
        again = flops / forward * (1 + self._recomputed("attention"))
        return again + self.backward * _BACKWARD_ATTENTION * flops / backward

    def _full(self, keys: float) -> float:
        """Price attention to so many keys at the speed of full attention."""
        flops = 4 * self.config.model.num_heads * self.config.model.head_dim * keys
        return self._attention(flops, self.rates.full_forward, self.rates.full_backward)

    def _sparse(self) -> float:
        """Price sparse attention over the selected keys, and the KV blocks that travel for it.

        An exchange brings f of the keys of cp - 1 other ranks, shared by this rank's own tokens; backward,
        dK and dV go back. It is counted in full: how much hides under computing is not known beforehand.
        """
        model, parallel = self.config.model, self.config.parallel
        flops = 4 * model.num_heads * model.head_dim * self._selected_keys
        price = self._attention(flops, self.rates.sparse_forward, self.rates.sparse_backward)
        fetched = self.rates.selected_fraction * (parallel.cp_size - 1)
        num_bytes = fetched * 2 * model.num_kv_heads * model.head_dim * _ELEMENT_BYTES
        return price + num_bytes * (1 + self.backward) / self.rates.link_bytes

    @property
    def _selected_keys(self) -> float:
        attention = self.config.attention
        return _mean_keys(self.doc_len, attention.topk * attention.block_size)

    def _index(self, *, sparse: bool) -> float:
        """Price the index branch: projections, scores of all earlier keys, the KL loss.

        Scores are computed once, even with recomputation, which replays the selection. A dense stage selects
        nothing; its KL loss looks at all keys.
        """
        model, attention, rates = self.config.model, self.config.attention, self.rates
        price = self.gemm(2 * model.hidden_size * (model.num_kv_heads + 1) * attention.index_head_dim)
        if sparse:
            price += 2 * attention.index_head_dim * model.num_kv_heads * self.doc_len / 2 / rates.scoring
        if self.backward and self.stage.kl is not KlTarget.none:
            keys = self._selected_keys if sparse else self.doc_len / 2
            per_key = model.head_dim * model.num_heads + 3 * attention.index_head_dim * model.num_kv_heads
            price += 2 * per_key * keys / rates.kl
        return price

    def _experts(self) -> float:
        """Price router, chosen and shared experts, and tokens sent to the experts' ranks and back."""
        model, ep_size = self.config.model, self.config.parallel.ep_size
        width = model.moe_router_topk * model.moe_ffn_hidden_size + model.shared_expert_hidden_size
        price = self.gemm(2 * model.hidden_size * (model.num_experts + 3 * width), "experts")
        num_bytes = 2 * model.moe_router_topk * model.hidden_size * _ELEMENT_BYTES * (1 - 1 / ep_size)
        return price + num_bytes / self.rates.link_bytes * (1 + self.backward + self._recomputed("experts"))


def _projection_flops(model: ModelConfig) -> float:
    """Return the FLOPs of query, key, value and output projections of a token: 2 H (2 Hq + 2 M) D."""
    return 2 * model.hidden_size * (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim


def _mean_keys(doc_len: int, most: int) -> float:
    """Return the mean over the tokens of a document of the keys that each sees, at most `most`.

    Example: 8 tokens, at most 4: 1, 2, 3, then 4 five times -> 3.25; at large sizes most - most^2 / (2 L).
    """
    if doc_len <= most:
        return (doc_len + 1) / 2
    return most - most * (most - 1) / (2 * doc_len)

"""Count FLOPs and bytes of one attention layer; a multiplication with its addition is 2 FLOPs.

Symbols: T tokens of a rank, H hidden size, Hq query heads, M KV heads, D head dim, Di index head dim, B block
size, K top-k; E = (query, selected block) pairs of one KV head, counted as whole tiles; C causal (query, key)
pairs. Per token of M3 (H 6144, Hq 64, M 4, D and Di 128, B 128, K 16), forward: projections 222 MFLOP (qkv
113, index 8, output 101), sparse attention 67 MFLOP; index scores grow with the length, 1,024 FLOP per key
before it.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from msa_train.config import AttentionConfig, ModelConfig

FP32_BYTES = 4
Amount = TypeVar("Amount", float, NDArray[np.float64])


@dataclass(kw_only=True, slots=True, frozen=True)
class LayerShape:
    """Hold the sizes of one layer."""

    hidden_size: int
    "H"
    num_heads: int
    "Hq, query heads"
    num_kv_heads: int
    "M, KV heads; one selection each"
    head_dim: int
    "D"
    index_head_dim: int
    "Di"
    block_size: int
    "B, tokens per block"
    topk: int
    "K, blocks that a query selects per KV head"
    local_blocks: int = 1
    "blocks of K that are always the last ones up to the query's own"
    element_bytes: int = 2
    "of activations on the wire: 2 for bf16, 4 for fp32"
    trains_index: bool = True
    "the KL loss is computed and its index-key gradients travel"

    @staticmethod
    def of(
        model: ModelConfig, attention: AttentionConfig, *, element_bytes: int = 2, trains_index: bool = True
    ) -> "LayerShape":
        """Take the sizes of a layer of this model."""
        return LayerShape(
            hidden_size=model.hidden_size,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            index_head_dim=attention.index_head_dim,
            block_size=attention.block_size,
            topk=attention.topk,
            local_blocks=attention.local_blocks,
            element_bytes=element_bytes,
            trains_index=trains_index,
        )

    @property
    def kv_token_bytes(self) -> int:
        """Return the bytes of keys and values of one token, all KV heads: 2048 for M3 in bf16."""
        # 2: a key and a value
        return 2 * self.num_kv_heads * self.head_dim * self.element_bytes

    @property
    def index_token_bytes(self) -> int:
        """Return the bytes of the index key of one token: 256 for M3 in bf16."""
        return self.index_head_dim * self.element_bytes

    @property
    def kv_block_bytes(self) -> int:
        """Return the bytes of keys and values of one KV block: 64 KiB for M3 in bf16."""
        return 2 * self.head_dim * self.block_size * self.element_bytes

    @property
    def kv_block_grad_bytes(self) -> int:
        """Return the bytes that come back for a KV block: 96 KiB for M3 in bf16.

        These are dK, dV and, with the KL loss, the gradient of the block's index keys by this KV head.
        """
        # index keys are shared by all KV heads, but each head's requester has a gradient for them of its own
        index = self.index_head_dim * self.block_size * self.element_bytes if self.trains_index else 0
        return self.kv_block_bytes + index

    @property
    def kv_block_added_bytes(self) -> int:
        """Return the bytes of the same where a collective adds them on the way, in fp32: 192 KiB for M3."""
        return self.kv_block_grad_bytes * max(FP32_BYTES, self.element_bytes) // self.element_bytes

    def qkv_flops(self, tokens: float) -> float:
        """Return the FLOPs of query, key and value projections: 2 T H (Hq + 2 M) D."""
        return 2 * tokens * self.hidden_size * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def index_projection_flops(self, tokens: float) -> float:
        """Return the FLOPs of index projections, a query per KV head and one key: 2 T H (M + 1) Di."""
        return 2 * tokens * self.hidden_size * (self.num_kv_heads + 1) * self.index_head_dim

    def output_flops(self, tokens: float) -> float:
        """Return the FLOPs of the output projection: 2 T Hq D H."""
        return 2 * tokens * self.hidden_size * self.num_heads * self.head_dim

    def index_flops(self, causal_pairs: Amount) -> Amount:
        """Return the FLOPs of index scores for all KV heads: 2 Di M C."""
        return 2 * self.index_head_dim * self.num_kv_heads * causal_pairs

    def sparse_flops(self, tiles: Amount) -> Amount:
        """Return the FLOPs of forward attention over E (query, block) pairs per KV head, `tiles`: 4 D Hq B E.

        Two products (scores, values) of 2 D FLOPs per query head and key; Hq / M query heads share a tile.
        """
        return 4 * self.head_dim * self.num_heads * self.block_size * tiles

    def full_flops(self, causal_pairs: float) -> float:
        """Return the FLOPs of forward attention over causal (query, key) pairs: 4 D Hq C."""
        return 4 * self.head_dim * self.num_heads * causal_pairs

    def kl_flops(self, tiles: Amount) -> Amount:
        """Return the FLOPs of the KL loss in the backward pass: 2 (D Hq + 3 Di M) B E.

        Teacher logits of all query heads, then per KV head student logits and gradients of query and key.
        """
        # 1 product with the keys for all Hq teachers, and 3 with the index keys for the M students
        per_token = self.head_dim * self.num_heads + 3 * self.index_head_dim * self.num_kv_heads
        return 2 * per_token * self.block_size * tiles


BACKWARD_FACTOR = 2.5
"FLOPs of an attention backward pass relative to its forward pass: five products (S, dP, dV, dQ, dK) for two"

"""FLOPs and bytes of one attention layer.

Symbols: T tokens of a rank, H hidden size, Hq query heads, M KV groups, D head dim, Di index head dim, B
block size, K top-k; E = (query, selected block) pairs of one group, counted as whole tiles; C causal
(query, key) pairs.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from msa_train.config import AttentionConfig, ModelConfig

Amount = TypeVar("Amount", float, NDArray[np.float64])


@dataclass(kw_only=True, slots=True, frozen=True)
class LayerShape:
    """Sizes of one layer."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    index_head_dim: int
    block_size: int
    topk: int
    local_blocks: int = 1
    element_bytes: int = 2
    "of activations on the wire: 2 for bf16, 4 for fp32"
    trains_index: bool = True
    "whether the KL loss is computed and its index-key gradients travel"

    @staticmethod
    def of(
        model: ModelConfig, attention: AttentionConfig, *, element_bytes: int = 2, trains_index: bool = True
    ) -> "LayerShape":
        """Sizes of a layer of this model."""
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
        """Keys and values of one token, all groups: 2048 for M3 in bf16."""
        return 2 * self.num_kv_heads * self.head_dim * self.element_bytes

    @property
    def index_token_bytes(self) -> int:
        """The index key of one token: 256 for M3 in bf16."""
        return self.index_head_dim * self.element_bytes

    @property
    def pair_bytes(self) -> int:
        """Keys and values of one (block, group) pair: 64 KiB for M3 in bf16."""
        return 2 * self.head_dim * self.block_size * self.element_bytes

    @property
    def pair_grad_bytes(self) -> int:
        """What returns for a pair: dK, dV and, with the KL loss, the index-key gradient of its group."""
        index = self.index_head_dim * self.block_size * self.element_bytes if self.trains_index else 0
        return self.pair_bytes + index

    def qkv_flops(self, tokens: float) -> float:
        """Query, key and value projections."""
        return 2 * tokens * self.hidden_size * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def index_projection_flops(self, tokens: float) -> float:
        """Projections of the index branch: one query per group, one key."""
        return 2 * tokens * self.hidden_size * (self.num_kv_heads + 1) * self.index_head_dim

    def output_flops(self, tokens: float) -> float:
        """Output projection."""
        return 2 * tokens * self.hidden_size * self.num_heads * self.head_dim

    def index_flops(self, causal_pairs: Amount) -> Amount:
        """Index scores of all groups."""
        return 2 * self.index_head_dim * self.num_kv_heads * causal_pairs

    def sparse_flops(self, tiles: Amount) -> Amount:
        """Forward attention over `tiles` (query, block) pairs per group."""
        return 4 * self.head_dim * self.num_heads * self.block_size * tiles

    def full_flops(self, causal_pairs: float) -> float:
        """Forward attention over causal (query, key) pairs; the backward pass has 2.5 times as many."""
        return 4 * self.head_dim * self.num_heads * causal_pairs

    def kl_flops(self, tiles: Amount) -> Amount:
        """KL loss of the index branch in the backward pass: teacher logits, student logits, two gradients."""
        per_token = self.head_dim * self.num_heads + 3 * self.index_head_dim * self.num_kv_heads
        return 2 * per_token * self.block_size * tiles


BACKWARD_FACTOR = 2.5
"FLOPs of an attention backward pass relative to its forward pass: five products instead of two"

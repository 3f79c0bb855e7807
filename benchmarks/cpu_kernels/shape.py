"""The layer that is measured; needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CoreShape:
    """One layer's attention. M3 has 16 query heads per KV head, and one index query head per KV head."""

    num_heads: int = 16
    num_kv_heads: int = 1
    head_dim: int = 128
    index_dim: int = 128
    block_size: int = 128
    topk: int = 16

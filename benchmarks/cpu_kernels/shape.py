"""Describe the layer that is measured; needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CoreShape:
    """Hold the sizes of one layer's attention.

    M3 has 16 query heads per KV head, and one index query head per KV head.
    """

    num_heads: int = 16
    "query heads"
    num_kv_heads: int = 1
    "each with one index query head"
    head_dim: int = 128
    "of queries, keys and values"
    index_dim: int = 128
    "of index queries and keys"
    block_size: int = 128
    "tokens of a block"
    topk: int = 16
    "blocks that a query selects per KV head"

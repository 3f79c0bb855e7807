"""Offer the operators of MiniMax Sparse Attention.

Block selection, block-sparse attention, the index branch's KL loss, decoding.

Depends on torch only; Triton is imported where one of its kernels runs. Every operator has a plain
`reference` and an `op` that never holds a query-by-sequence matrix.
"""

from msa_kernels.block_sparse_attention.op import block_sparse_attention
from msa_kernels.block_sparse_attention.window import TokenWindow, window_blocks
from msa_kernels.decode.cache import DecodeCache
from msa_kernels.decode.op import decode_attention
from msa_kernels.fp8 import quantize_index_keys
from msa_kernels.indexer_kl.op import IndexerKl, indexer_kl
from msa_kernels.select_blocks.op import select_blocks

__all__ = [
    "DecodeCache",
    "IndexerKl",
    "TokenWindow",
    "block_sparse_attention",
    "decode_attention",
    "indexer_kl",
    "quantize_index_keys",
    "select_blocks",
    "window_blocks",
]

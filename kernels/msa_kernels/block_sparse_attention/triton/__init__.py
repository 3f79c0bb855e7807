"""Attention over a pool by Triton kernels, forward and backward. Imports Triton."""

from msa_kernels.block_sparse_attention.triton.backward import backward
from msa_kernels.block_sparse_attention.triton.forward import forward

__all__ = ["backward", "forward"]

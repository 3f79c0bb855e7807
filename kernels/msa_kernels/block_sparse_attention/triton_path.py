"""Attention over a pool by Triton kernels, forward and backward. Imports Triton."""

from msa_kernels.block_sparse_attention.launch import forward
from msa_kernels.block_sparse_attention.launch_backward import backward

__all__ = ["backward", "forward"]

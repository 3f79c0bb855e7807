"""Attend to a pool by Triton kernels, forward and backward. Imports Triton."""

from msa_kernels.block_sparse_attention.triton.launch_backward import backward
from msa_kernels.block_sparse_attention.triton.launch_forward import forward

__all__ = ["backward", "forward"]

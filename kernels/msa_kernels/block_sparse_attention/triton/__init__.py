"""Attend to a pool by Triton kernels, forward and backward. Imports Triton."""

from msa_kernels.block_sparse_attention.triton.launch_backward import backward, output_delta
from msa_kernels.block_sparse_attention.triton.launch_forward import forward

__all__ = ["backward", "forward", "output_delta"]

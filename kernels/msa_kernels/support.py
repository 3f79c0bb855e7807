"""Tell what the Triton kernels can serve, from sizes instead of tensors: before a run starts."""

import torch

from msa_kernels.block_sparse_attention.choice import unsupported
from msa_kernels.select_blocks.op import not_in_triton


def why_not_triton(
    dtype: torch.dtype,
    *,
    num_kv_heads: int,
    heads_per_group: int,
    head_dim: int,
    block_size: int,
    index_head_dim: int = 0,
    topk: int = 1,
) -> str | None:
    """Return why selection or attention has no Triton kernel, forward or backward, for these sizes.

    Args:
        dtype: of all tensors.
        num_kv_heads: KV heads. heads_per_group: query heads of each.
        head_dim, index_head_dim: channels; no index branch with 0.
        block_size: tokens per block.
        topk: blocks per query and KV head.

    Returns:
        Text for an error, "name=value: rule"; None where there are kernels.
    """

    def sizes(*shape: int) -> torch.Tensor:
        """Make a tensor without data, which answers the same questions as those of a call."""
        return torch.empty(shape, dtype=dtype, device="meta")

    q, kv = sizes(1, num_kv_heads, heads_per_group, head_dim), sizes(1, 2, block_size, head_dim)
    if index_head_dim == 0:
        return unsupported(q, kv, None, None)
    q_index, k_index = sizes(1, num_kv_heads, index_head_dim), sizes(1, block_size, index_head_dim)
    return unsupported(q, kv, q_index, k_index) or not_in_triton(q_index, k_index[0], block_size, topk)

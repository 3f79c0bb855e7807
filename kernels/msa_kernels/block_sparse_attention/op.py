"""Attend to selected blocks of a whole pack in one process, with autograd.

Shapes: T queries, M KV heads, G query heads of each, D head dim, S keys of the pack, B block size, NB = S /
B.
"""

from typing import Any

import torch
from torch import Tensor

from msa_kernels.arguments import check_floating, check_integer, check_same_device, check_values
from msa_kernels.block_sparse_attention.across_pools import output_delta
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import BlockPool, SparseQueries
from msa_kernels.block_sparse_attention.window import TokenWindow


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    query_offset: int = 0,
    window: TokenWindow | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend with each query to the visible tokens of its selected blocks.

    Args:
        q: [T, num_heads, D] queries of positions `query_offset ...`.
        k, v: [S, num_kv_heads, D]; num_kv_heads divides num_heads.
        block_indices: [T, num_kv_heads, topk] int, global block ids, -1 for none, no id twice in a row.
            Blocks must lie in the query's document and not in its future (`select_blocks` gives such).
        block_size: tokens per block; divides S.
        softmax_scale: factor of the scores, above 0; default D ** -0.5.
        query_offset: position of the first query in the pack.
        window: hides tokens of the blocks that lie before a query's window (`window_blocks` gives the blocks
            and the window); None: every token of the blocks up to the query is visible.
        kernel: "triton" (GPUs; fp32, fp16, bf16), "cpu" (tiled, in torch, any device), "reference" (the
            definition, much memory), or "auto": Triton where it is installed and has tiles for the sizes, for
            tensors on a GPU, else "cpu".

    Returns:
        out [T, num_heads, D] in q's dtype and lse [T, num_heads], natural log, fp32 (fp64 for fp64 inputs,
        not differentiable). A query without blocks gets out 0 and lse -inf.

    Raises:
        ValueError: on shapes, dtypes, devices or sizes that do not fit, where `kernel` cannot serve the call,
            and on block ids out of range (on a device: only where MSA_KERNELS_CHECK=1, since looking means
            waiting).

    Source: arXiv 2606.13392 section 2.
    """
    check_attention(q, k, v, block_indices, block_size, query_offset)
    if window is not None and not window.start.shape == window.sink_stop.shape == q.shape[:1]:
        raise ValueError(
            f"window.start.shape={tuple(window.start.shape)}, window.sink_stop.shape="
            f"{tuple(window.sink_stop.shape)}: must be [T] = [{q.shape[0]}]"
        )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if not scale > 0.0:
        raise ValueError(f"softmax_scale={scale}: must be above 0, kernels divide by it; negate q instead")
    return _BlockSparseAttention.apply(
        q, k, v, block_indices, block_size, scale, query_offset, window, kernel
    )


class _BlockSparseAttention(torch.autograd.Function):
    """Join the forward and the backward over the pool that holds the whole pack."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_indices: Tensor,
        block_size: int,
        softmax_scale: float,
        query_offset: int,
        window: TokenWindow | None,
        kernel: str,
    ) -> tuple[Tensor, Tensor]:
        """Attend, and keep inputs, output and log-sum-exp for the backward."""
        arguments = (block_size, softmax_scale, query_offset, window)
        queries, pool, block_table = whole_pack(q, k, v, block_indices, *arguments)
        result = pool_forward(queries, pool, block_table, kernel=kernel)
        out = result.out.flatten(1, 2).to(q.dtype)
        ctx.save_for_backward(q, k, v, block_indices, out, result.lse)
        ctx.arguments, ctx.kernel = arguments, kernel
        # lse is there for merging: a gradient through it would need another term in ds
        lse = result.lse.flatten(1)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        """Form the gradients of q, k and v."""
        q, k, v, block_indices, out, lse = ctx.saved_tensors
        queries, pool, block_table = whole_pack(q, k, v, block_indices, *ctx.arguments)
        # sum over keys of p * dp, the same for every key: see tiled_backward.py
        dout = dout.view_as(queries.q)
        delta = output_delta(dout, out.view_as(dout), kernel=ctx.kernel)
        grads = pool_backward(queries, pool, block_table, dout, delta, lse, None, kernel=ctx.kernel)
        dk, dv = unpack_blocks(grads.dkv, k.shape[1])
        return grads.dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *(None,) * 6


def whole_pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    softmax_scale: float,
    query_offset: int,
    window: TokenWindow | None,
) -> tuple[SparseQueries, BlockPool, Tensor]:
    """Make a pool of all blocks of all KV heads, and the block table: physical block = KV head * NB + block.

    Example (NB 8): blocks [0, 5, -1] of KV head 1 are [8, 13, -1] in the block table.
    """
    T, M, num_blocks = q.shape[0], k.shape[1], k.shape[0] // block_size
    position = torch.arange(query_offset, query_offset + T, device=q.device)
    q = q.view(T, M, -1, q.shape[-1])
    queries = SparseQueries(q=q, position=position, softmax_scale=softmax_scale, window=window)
    block = torch.arange(num_blocks, device=q.device).repeat(M)
    pool = BlockPool(kv=pack_blocks(k, v, block_size), block=block)
    head = torch.arange(M, device=q.device)[:, None]
    ids = block_indices.long()
    return queries, pool, torch.where(ids >= 0, ids + head * num_blocks, -1)


def pack_blocks(k: Tensor, v: Tensor, block_size: int) -> Tensor:
    """Order keys and values by KV head, then block: k, v [S, M, D] -> [M * NB, 2, B, D].

    Example (S 4, B 2, M 2): physical block 0 is tokens 0, 1 of KV head 0, block 1 its tokens 2, 3, block 2
    tokens 0, 1 of KV head 1. So each block of a head lies in one piece, which a kernel or a message reads at
    once.
    """
    M, D = k.shape[1:]
    # [2, NB, B, M, D] -> [M, NB, 2, B, D]
    kv = torch.stack((k, v)).view(2, -1, block_size, M, D)
    return kv.permute(3, 1, 0, 2, 4).reshape(-1, 2, block_size, D)


def unpack_blocks(kv: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Undo `pack_blocks`: [M * NB, 2, B, D] -> k, v [NB * B, M, D]."""
    D = kv.shape[-1]
    k, v = kv.view(num_kv_heads, -1, *kv.shape[1:]).permute(2, 1, 3, 0, 4).reshape(2, -1, num_kv_heads, D)
    return k, v


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_size: int, query_offset: int
) -> None:
    """Raise ValueError on shapes, dtypes, devices, sizes and block ids that do not fit."""
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q.shape={tuple(q.shape)}, k.shape={tuple(k.shape)}, v.shape={tuple(v.shape)}: must be "
            "[T, num_heads, D], [S, num_kv_heads, D] twice"
        )
    if 0 in (*q.shape[1:], k.shape[1]):
        raise ValueError(
            f"q.shape={tuple(q.shape)}, k.shape={tuple(k.shape)}: num_heads, num_kv_heads and D must be "
            "at least 1"
        )
    check_floating(q=q, k=k, v=v)
    check_integer(block_indices=block_indices)
    check_same_device(q=q, k=k, v=v, block_indices=block_indices)
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: must be at least 1")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"num_heads={q.shape[1]}: must be a multiple of num_kv_heads={k.shape[1]}")
    if block_indices.dim() != 3 or block_indices.shape[:2] != (q.shape[0], k.shape[1]):
        raise ValueError(
            f"block_indices.shape={tuple(block_indices.shape)}: must be [T, num_kv_heads, topk] = "
            f"[{q.shape[0]}, {k.shape[1]}, topk]"
        )
    if k.shape[0] % block_size:
        raise ValueError(f"S={k.shape[0]}: must be a multiple of block_size={block_size}; pad the pack")
    if query_offset < 0 or query_offset + q.shape[0] > k.shape[0]:
        raise ValueError(
            f"query_offset={query_offset}: must not be negative, and with T={q.shape[0]} queries "
            f"it must not exceed S={k.shape[0]}"
        )
    most = k.shape[0] // block_size - 1
    check_values(
        "block_indices", block_indices, -1, most, f"from 0 to S / block_size - 1 = {most}, -1 for none"
    )

"""Form the KL loss of the index branch over the tokens of the selected blocks, and its gradients.

Training takes them from the backward pass of attention (`pool_backward`), which has the probabilities anyway.
This is the loss by itself, for index branches that are trained or measured alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msa_kernels.arguments import check_floating, check_same_device
from msa_kernels.block_sparse_attention.op import check_attention, whole_pack
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import KlTerm


@dataclass(slots=True)
class IndexerKl:
    """Hold the KL loss and its gradients."""

    dq_index: Tensor
    """[T, M, Di] of the index queries, in their dtype."""
    dk_index: Tensor
    """[S, Di] of the index keys, in their dtype."""
    loss: Tensor
    """Weighted sum of the divergences over queries and KV heads, fp64 scalar, in nats."""


@torch.no_grad()
def indexer_kl(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    index_scale: float | None = None,
    temperature: float = 1.0,
    weight: float = 1.0,
    query_offset: int = 0,
    kernel: str = "auto",
) -> IndexerKl:
    """Sum KL(teacher || student) over queries and KV heads, and form its gradients.

    Teacher: mean over the query heads of a KV head of their attention probabilities over the selected
    tokens, no gradient. Student: softmax of the index scores over the same tokens.

    Args:
        q: [T, num_heads, D] queries of consecutive positions `query_offset ...`, head h of KV
            head h // (num_heads / M). k: [S, M, D].
        q_index: [T, M, Di]; k_index: [S, Di].
        block_indices: [T, M, topk] int, blocks as `select_blocks` returns them, -1 for none.
        block_size: tokens per block.
        softmax_scale, index_scale: factors of the scores; None: D^-0.5 and Di^-0.5.
        temperature: divides the logits of teacher and student.
        weight: factor of loss and gradients.
        query_offset: position of the first query in the pack.
        kernel: "triton", "cpu", "reference" or "auto", see `block_sparse_attention`.

    Raises:
        ValueError: on shapes, dtypes, devices or sizes that do not fit, and where `kernel` cannot serve.

    Source: arXiv 2606.13392, equations 9 and 10.
    """
    check_attention(q, k, k, block_indices, block_size, query_offset)
    _check_index(q, k, q_index, k_index, temperature)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    student_scale = q_index.shape[-1] ** -0.5 if index_scale is None else index_scale
    queries, pool, block_table = whole_pack(
        q, k, k, block_indices, block_size, scale, query_offset, window=None
    )
    queries = replace(
        queries,
        q_index=q_index,
        k_index=k_index.view(-1, block_size, k_index.shape[-1]),
        index_scale=student_scale / temperature,
        temperature=temperature,
    )
    # attention itself is needed for its log-sum-exps, by which teacher and student are normalised
    part = pool_forward(queries, pool, block_table, kernel=kernel)
    assert part.lse_index is not None, "there is an index branch"
    term = KlTerm(lse_index=part.lse_index, weight=weight, lse_teacher=part.lse_teacher)
    # no gradient arrives at attention's output: what is left is the loss's own
    grads = pool_backward(
        queries, pool, block_table, torch.zeros_like(part.out), torch.zeros_like(part.lse), part.lse, term,
        kernel=kernel,
    )  # fmt: skip
    assert grads.dq_index is not None, "there is a KL term"
    assert grads.dk_index is not None, "there is a KL term"
    assert grads.kl is not None, "there is a KL term"
    # all KV heads share the index keys: physical blocks are ordered by KV head, so their gradients add up
    dk_index = grads.dk_index.view(k.shape[1], *k_index.shape).sum(0)
    return IndexerKl(grads.dq_index.to(q_index.dtype), dk_index.to(k_index.dtype), weight * grads.kl)


def _check_index(q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor, temperature: float) -> None:
    """Raise ValueError on shapes and dtypes of the index branch, or a temperature, that do not fit."""
    if q_index.dim() != 3 or q_index.shape[:2] != (q.shape[0], k.shape[1]) or q_index.shape[-1] == 0:
        raise ValueError(
            f"q_index.shape={tuple(q_index.shape)}: must be [T, num_kv_heads, Di] = "
            f"[{q.shape[0]}, {k.shape[1]}, Di]"
        )
    if k_index.shape != (k.shape[0], q_index.shape[-1]):
        raise ValueError(
            f"k_index.shape={tuple(k_index.shape)}: must be [S, Di] = [{k.shape[0]}, {q_index.shape[-1]}]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0; 1 leaves the scores as they are")
    check_floating(q_index=q_index, k_index=k_index)
    check_same_device(q=q, q_index=q_index, k_index=k_index)

"""Plain block selection: the definition, with the whole score matrix in memory."""

import torch
from torch import Tensor


def select_blocks_reference(
    q_index: Tensor,
    k_index: Tensor,
    cu_seqlens: Tensor,
    *,
    block_size: int,
    topk: int,
    local_blocks: int = 1,
    query_offset: int = 0,
    query_valid: Tensor | None = None,
    position: Tensor | None = None,
    lse_scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same contract as `op.select_blocks`; one query at a time, for tests.

    lse_scale: factor of the scores in the log-sum-exp; None: it is None.

    Source: MiniMax Sparse Attention (arXiv 2606.13392), section 2: block score = max of the token
    scores over the visible tokens of the block; top-k of them with the query's own block forced.
    """
    num_queries, num_kv_heads, _ = q_index.shape
    block_indices = torch.full((num_queries, num_kv_heads, topk), -1, dtype=torch.int32)
    lse = torch.full(q_index.shape[:2], float("-inf"), dtype=torch.float64)
    starts = cu_seqlens.tolist()
    for i in range(num_queries):
        if query_valid is not None and not bool(query_valid[i]):
            continue
        place = query_offset + i if position is None else int(position[i])
        doc_start = max(s for s in starts[:-1] if s <= place)
        own, first = place // block_size, doc_start // block_size
        for group in range(num_kv_heads):
            scored, lse_of = [], {}
            for block in range(first, own + 1):
                keys = k_index[block * block_size : min((block + 1) * block_size, place + 1)]
                scores = keys.double() @ q_index[i, group].double()
                forced = block > own - local_blocks
                scored.append((float("-inf") if forced else -scores.max().item(), block))
                lse_of[block] = (scores * (lse_scale or 1.0)).logsumexp(0)
            chosen = sorted(block for _, block in sorted(scored)[:topk])
            block_indices[i, group, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
            lse[i, group] = torch.stack([lse_of[block] for block in chosen]).logsumexp(0)
    block_indices = block_indices.to(q_index.device)
    if lse_scale is None:
        return block_indices, None
    return block_indices, lse.to(q_index.device, torch.promote_types(q_index.dtype, torch.float32))

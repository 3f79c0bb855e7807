"""Define block selection plainly, with the whole score matrix in memory."""

import torch
from torch import Tensor

from msa_kernels.select_blocks.types import SelectionArgs


def select_blocks_reference(args: SelectionArgs) -> tuple[Tensor, Tensor | None]:
    """Follow the contract of `op.select_blocks` one query at a time, for tests.

    Source: MiniMax Sparse Attention (arXiv 2606.13392), section 2: block score = max of the token
    scores over the visible tokens of the block; top-k of them with the query's own block forced.
    """
    q_index, k_index, block_size = args.q_index, args.k_index, args.block_size
    num_queries, num_kv_heads, _ = q_index.shape
    block_indices = torch.full((num_queries, num_kv_heads, args.topk), -1, dtype=torch.int32)
    lse = torch.full(q_index.shape[:2], float("-inf"), dtype=torch.float64)
    starts = args.cu_seqlens.tolist()
    for i in range(num_queries):
        if args.query_valid is not None and not bool(args.query_valid[i]):
            continue
        place = args.query_offset + i if args.position is None else int(args.position[i])
        doc_start = max(s for s in starts[:-1] if s <= place)
        own, first = place // block_size, doc_start // block_size
        for head in range(num_kv_heads):
            scored, lse_of = [], {}
            for block in range(first, own + 1):
                keys = k_index[block * block_size : min((block + 1) * block_size, place + 1)]
                scores = keys.double() @ q_index[i, head].double()
                forced = block > own - args.local_blocks
                # sorted ascending: best first, forced before all, and of equal ones the lower id
                scored.append((float("-inf") if forced else -scores.max().item(), block))
                lse_of[block] = (scores * (args.lse_scale or 1.0)).logsumexp(0)
            chosen = sorted(block for _, block in sorted(scored)[: args.topk])
            block_indices[i, head, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
            lse[i, head] = torch.stack([lse_of[block] for block in chosen]).logsumexp(0)
    block_indices = block_indices.to(q_index.device)
    if args.lse_scale is None:
        return block_indices, None
    return block_indices, lse.to(q_index.device, torch.promote_types(q_index.dtype, torch.float32))

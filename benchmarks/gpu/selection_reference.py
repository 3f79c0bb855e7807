"""Select by the definition, in plain torch: what kernels are checked with and compared to."""

import torch
from torch import Tensor

from benchmarks.gpu.problem import IndexBranch, LayerSizes

# Queries whose scores are held at once.
TOPK_QUERIES = 512


def exact_selection(
    q: Tensor, k: Tensor, position: Tensor, first_token: Tensor, *, block_size: int, topk: int
) -> Tensor:
    """Select by fp64 scores: [T, M, K] int32, unordered, -1 for none; ties are left to `torch.topk`.

    Args:
        q: [T, M, Di] index queries at `position` [T].
        k: [S, Di] index keys.
        position, first_token: [T] int64, of the queries, and where their documents begin.
        block_size, topk: tokens per block; blocks per query and group, the query's own among them.
    """
    scores = torch.einsum("tmd,sd->tms", q.double(), k.double()).unflatten(-1, (-1, block_size)).amax(-1)
    block = torch.arange(scores.shape[-1], device=q.device)
    own, first = position[:, None, None] // block_size, first_token[:, None, None] // block_size
    return _best(scores, block, first, own, topk)


def torch_topk(index: IndexBranch, sizes: LayerSizes, num_queries: int | None = None) -> Tensor:
    """Select from scores in memory and `torch.topk`, some queries at a time: [T, M, K] int32, unordered.

    Args:
        index: queries and keys of one document.
        sizes: of the layer.
        num_queries: the last ones alone; None: all.
    """
    B, seq_len = sizes.block_size, index.k.shape[0]
    found = []
    for begin in range(0 if num_queries is None else seq_len - num_queries, seq_len, TOPK_QUERIES):
        end = min(begin + TOPK_QUERIES, seq_len)
        # blocks that any of these queries sees
        visible = -(-end // B)
        scores = index.q[begin:end].flatten(0, 1) @ index.k[: visible * B].T
        scores = scores.view(end - begin, sizes.num_kv_heads, visible, B).amax(-1)
        own = (torch.arange(begin, end, device=scores.device) // B)[:, None, None]
        block = torch.arange(visible, device=scores.device)
        found.append(_best(scores, block, torch.zeros_like(own), own, sizes.topk))
    return torch.cat(found)


def _best(scores: Tensor, block: Tensor, first: Tensor, own: Tensor, topk: int) -> Tensor:
    """Select the own block and the best before it: scores [T, M, NB]; block [NB]; first, own [T, 1, 1]."""
    scores = torch.where(block == own, float("inf"), scores)
    scores = torch.where((block > own) | (block < first), float("-inf"), scores)
    width = min(topk, scores.shape[-1])
    best = scores.topk(width, dim=-1)
    ids = torch.where(best.values > float("-inf"), best.indices, -1).int()
    return torch.nn.functional.pad(ids, (0, topk - width), value=-1)

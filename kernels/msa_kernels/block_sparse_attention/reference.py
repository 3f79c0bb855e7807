"""Define attention and KL loss plainly, with a mask over the whole sequence: for tests, any device and dtype.

Shapes: T queries, M KV heads, G query heads of each, D head dim, Di index head dim, S tokens.
"""

import torch
from torch import Tensor


def selection_mask(block_indices: Tensor, position: Tensor, *, seq_len: int, block_size: int) -> Tensor:
    """Mark the visible tokens of every query: [T, M, topk] block ids -> [T, M, S] bool.

    Token j is visible to the query at position i when its block is selected and j <= i.

    Example (block_size 2, S 6): blocks [0, 2] and position 4 give tokens 0, 1, 4.
    """
    num_queries, num_kv_heads, _ = block_indices.shape
    chosen = torch.zeros(num_queries, num_kv_heads, seq_len // block_size + 1, dtype=torch.bool)
    # one block more takes the empty slots, as -1 modulo their number is the last
    chosen.scatter_(2, block_indices.long().cpu() % (seq_len // block_size + 1), True)
    tokens = chosen[:, :, :-1].repeat_interleave(block_size, dim=2).to(position.device)
    return tokens & (torch.arange(seq_len, device=position.device) <= position[:, None, None])


def window_mask(
    position: Tensor, doc_start: Tensor, *, seq_len: int, block_size: int, window: int, sink_blocks: int = 0
) -> Tensor:
    """Mark the visible tokens of a sliding window: positions and document starts [T] -> [T, S] bool.

    Token j of the query's document is visible at position i when i - window < j <= i, or j <= i and j lies
    in the first `sink_blocks` blocks of the document.
    """
    token = torch.arange(seq_len, device=position.device)
    position, doc_start = position[:, None], doc_start[:, None]
    near = token > position - window
    sink = token < doc_start + sink_blocks * block_size
    return (token >= doc_start) & (token <= position) & (near | sink)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with a mask.

    q [T, M, G, D], k and v [S, M, D], mask [T, M, S] -> out [T, M, G, D], lse [T, M, G]. Queries that see
    nothing get out 0 and lse -inf.
    """
    scores = torch.einsum("tmgd,smd->tmgs", q, k) * softmax_scale
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return torch.einsum("tmgs,smd->tmgd", p, v), lse


def kl_reference(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    mask: Tensor,
    *,
    softmax_scale: float,
    index_scale: float,
) -> Tensor:
    """Sum KL(teacher || student) over queries and KV heads, arXiv 2606.13392 equations 9 and 10.

    Teacher: mean over the query heads of a KV head of their attention probabilities, detached. Student:
    softmax of the index scores over the same tokens. q_index [T, M, Di], k_index [S, Di]; differentiable in
    both.
    """
    scores = torch.einsum("tmgd,smd->tmgs", q.detach(), k.detach()) * softmax_scale
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    # queries that see nothing have no distribution, and add nothing
    valid = mask.any(-1)
    teacher = scores.softmax(-1).mean(2)[valid]
    student = (torch.einsum("tmd,sd->tms", q_index, k_index) * index_scale)[valid]
    student = student.masked_fill(~mask[valid], float("-inf")).log_softmax(-1)
    # 0 * -inf of hidden tokens would not be a number
    cross = torch.where(mask[valid], teacher * student.masked_fill(~mask[valid], 0.0), 0.0)
    return (torch.xlogy(teacher, teacher) - cross).sum()

"""Times of the sparse layer's operators: selection, attention forward, and backward with the KL loss."""

from dataclasses import dataclass

import torch
from msa_kernels import decode_attention
from msa_kernels.block_sparse_attention.pool import KlTerm, pool_backward, pool_forward
from msa_kernels.decode.cache import DecodeCache
from torch import Tensor

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.problem import (
    GroupProblem,
    IndexBranch,
    LayerSizes,
    Tensors,
    make_groups,
    make_index,
    select,
)

# Rows of scores that are held at once by the selection that `torch.topk` makes.
TOPK_QUERIES = 512
# Query and output values, of all groups, up to which they are computed together.
MOST_VALUES = 2**31


@dataclass(slots=True)
class SparseTimes:
    """Seconds over all KV groups.

    select: block ids. forward: attention alone, as in a prefill. training_forward: with the normaliser of the
    KL loss too. backward: attention and KL loss. num_pairs: (query, group, block) computed.
    """

    select: float
    forward: float
    training_forward: float
    backward: float
    num_pairs: int
    groups_at_once: int


def groups_at_once(sizes: LayerSizes, seq_len: int) -> int:
    """KV groups whose queries, outputs and gradients fit the memory together."""
    return max(1, min(sizes.num_kv_heads, MOST_VALUES // (seq_len * sizes.heads_per_group * sizes.head_dim)))


def sparse_times(clock: Clock, tensors: Tensors, sizes: LayerSizes, seq_len: int, kernel: str) -> SparseTimes:
    """All operators on one document of seq_len tokens.

    Where not all groups fit the memory, some are timed and the time is multiplied: groups share no work in
    the attention. The selection is timed as a whole.
    """
    index = make_index(tensors, sizes, seq_len)
    select_s = clock.seconds(lambda: select(index, sizes, kernel))
    ids = select(index, sizes, kernel)
    at_once = groups_at_once(sizes, seq_len)
    factor = sizes.num_kv_heads / at_once
    num_pairs = int((ids >= 0).sum())
    ids = ids[:, :at_once].contiguous()
    plain = make_groups(tensors, sizes, index, ids, with_kl=False)
    forward_s = _forward(clock, plain, kernel)
    # as large as what comes next
    del plain
    training_s, backward_s = _training(clock, make_groups(tensors, sizes, index, ids, with_kl=True), kernel)
    return SparseTimes(
        select=select_s,
        forward=factor * forward_s,
        training_forward=factor * training_s,
        backward=factor * backward_s,
        num_pairs=num_pairs,
        groups_at_once=at_once,
    )


def _forward(clock: Clock, problem: GroupProblem, kernel: str) -> float:
    return clock.seconds(lambda: pool_forward(problem.queries, problem.pool, problem.entries, kernel=kernel))


def _training(clock: Clock, problem: GroupProblem, kernel: str) -> tuple[float, float]:
    """Seconds of the forward with the KL loss's normaliser, and of the backward."""
    queries, pool, entries = problem.queries, problem.pool, problem.entries
    forward_s = clock.seconds(lambda: pool_forward(queries, pool, entries, kernel=kernel))
    part = pool_forward(queries, pool, entries, kernel=kernel)
    assert part.lse_index is not None, "made with an index branch"
    term = KlTerm(part.lse_index, weight=1.0)

    def backward() -> None:
        dout = problem.dout.to(queries.compute_dtype)
        # with the merged output, as the layer has it
        delta = (dout * part.out).sum(-1)
        pool_backward(queries, pool, entries, dout, delta, part.lse, term, kernel=kernel)

    return forward_s, clock.seconds(backward)


def torch_topk(index: IndexBranch, sizes: LayerSizes) -> Tensor:
    """The same selection from scores in memory, some queries at a time: [S, M, K] int64, unordered.

    The query's own block is forced as in `select_blocks`; ties are left to `torch.topk`.
    """
    B, seq_len = sizes.block_size, index.k.shape[0]
    found = []
    for begin in range(0, seq_len, TOPK_QUERIES):
        end = min(begin + TOPK_QUERIES, seq_len)
        # blocks that any of these queries sees
        visible = -(-end // B)
        scores = index.q[begin:end].flatten(0, 1) @ index.k[: visible * B].T
        scores = scores.view(end - begin, sizes.num_kv_heads, visible, B).amax(-1)
        own = (torch.arange(begin, end, device=scores.device) // B)[:, None, None]
        block = torch.arange(visible, device=scores.device)
        scores = torch.where(block < own, scores, torch.where(block == own, float("inf"), float("-inf")))
        width = min(sizes.topk, visible)
        best = scores.topk(width, dim=-1)
        ids = torch.where(best.values > float("-inf"), best.indices, -1)
        found.append(torch.nn.functional.pad(ids, (0, sizes.topk - width), value=-1))
    return torch.cat(found)


def topk_times(
    clock: Clock, tensors: Tensors, sizes: LayerSizes, seq_len: int, kernel: str
) -> tuple[float, float]:
    """Seconds of `select_blocks` and of `torch_topk`."""
    index = make_index(tensors, sizes, seq_len)
    ours = clock.seconds(lambda: select(index, sizes, kernel))
    return ours, clock.seconds(lambda: torch_topk(index, sizes))


def decode_time(clock: Clock, tensors: Tensors, sizes: LayerSizes, seq_len: int, kernel: str) -> float:
    """Seconds of one new token of one sequence against a flat cache: selection and attention."""
    M, D, Di = sizes.num_kv_heads, sizes.head_dim, sizes.index_head_dim
    normal = tensors.normal
    k, v = (normal(1, seq_len, M, D) for _ in range(2))
    cache = DecodeCache(k=k, v=v, k_index=normal(1, seq_len, Di))
    q, q_index = normal(1, sizes.num_heads, D), normal(1, M, Di)
    lens = torch.tensor([seq_len], dtype=torch.int32, device=tensors.device)

    def step() -> None:
        decode_attention(q, q_index, cache, lens, block_size=sizes.block_size, topk=sizes.topk, kernel=kernel)

    return clock.seconds(step)

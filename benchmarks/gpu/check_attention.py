"""Check attention over pools of blocks, forward, backward and KL loss, in the ways that it can be cut.

A problem is some queries of two documents against all keys, with the blocks that the exact selection gives.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from msa_kernels import window_blocks
from msa_kernels.block_sparse_attention.op import pack_blocks, unpack_blocks
from msa_kernels.block_sparse_attention.reference import (
    attention_reference,
    kl_reference,
    selection_mask,
    window_mask,
)
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, PoolOutput, SparseQueries
from msa_kernels.block_sparse_attention.window import TokenWindow
from torch import Tensor

from benchmarks.gpu.check_selection import make_selection
from benchmarks.gpu.comparison import Check, against_plain
from benchmarks.gpu.patches import Change, changed
from benchmarks.gpu.problem import LayerSizes, Tensors
from benchmarks.gpu.selection_reference import exact_selection

_TRITON = "msa_kernels.block_sparse_attention.triton"
_FORWARD, _BACKWARD = f"{_TRITON}.launch_forward", f"{_TRITON}.launch_backward"
_CONFIGS = "msa_kernels.block_sparse_attention.configs"
QUERIES_FIRST = "attention, queries first"
NAMES = ("out", "dq", "dk", "dv", "dq_index", "dk_index", "kl")


@dataclass(frozen=True, slots=True)
class Case:
    """Say how a problem is cut and what it has."""

    groups: int = 0
    """KV groups; 0: as many as the layer."""
    portions: int = 1
    """Parts that the queries are taken in, at least."""
    split_lists: bool = False
    """The queries of a block are more than one program takes."""
    num_pools: int = 1
    """Pools that hold the blocks, whose outputs are merged."""
    temperature: float = 1.0
    """Divides the scores of the KL loss."""
    window_blocks: int = 0
    """Sliding window of so many blocks in place of a selection; it has no index branch."""
    queries_first: bool = False
    """The forward takes queries first, else blocks, whatever neighbours have in common."""


CASES = {
    "attention": Case(),
    "attention, portions, split lists": Case(portions=4, split_lists=True),
    "attention, one group": Case(groups=1, portions=4, split_lists=True),
    "attention, two groups": Case(groups=2, portions=4),
    "attention, two pools": Case(num_pools=2),
    "attention, temperature 2": Case(temperature=2.0),
    "attention, window": Case(window_blocks=3, portions=4),
    QUERIES_FIRST: Case(portions=4, queries_first=True),
    "attention, queries first, two pools": Case(num_pools=2, temperature=2.0, queries_first=True),
    "attention, queries first, window": Case(window_blocks=3, queries_first=True),
}


@dataclass(slots=True)
class AttentionProblem:
    """Hold the tensors of one case: T queries, S keys, M groups."""

    inputs: tuple[Tensor, ...]
    """q [T, M, G, D], k and v [S, M, D], q_index [T, M, Di], k_index [S, Di]."""
    dout: Tensor
    """[T, M, G, D], gradient of the output."""
    position: Tensor
    """[T], of the queries."""
    block_indices: Tensor
    """[T, M, K] int."""
    mask: Tensor
    """[T, M, S] bool: what each query sees."""
    window: TokenWindow | None
    """Tokens that a sliding window shows; None for a selection."""
    block_size: int
    """Tokens of a block."""
    case: Case
    """That this is the problem of."""

    @property
    def scales(self) -> dict[str, float]:
        """Return the factors of the scores; the temperature divides those of the KL loss."""
        q, k_index = self.inputs[0], self.inputs[4]
        return {"softmax_scale": q.shape[-1] ** -0.5, "index_scale": k_index.shape[-1] ** -0.5}


def attention_cases(
    tensors: Tensors, sizes: LayerSizes, kernel: str, *, seq_len: int, num_queries: int
) -> dict[str, Callable[[], list[Check]]]:
    """Return the cases by name."""

    def run(name: str, case: Case) -> list[Check]:
        problem = _make(tensors, sizes, seq_len, num_queries, case)
        with changed(_limits(problem, kernel)):
            ours = _pool_run(problem, kernel)
        plain, exact = (_plain_run(problem, dtype) for dtype in (tensors.dtype, torch.float64))
        names = NAMES[: len(ours)]
        return [
            against_plain(f"{name}: {n}", *both) for n, *both in zip(names, ours, plain, exact, strict=True)
        ]

    return {name: lambda name=name, case=case: run(name, case) for name, case in CASES.items()}


def _make(tensors: Tensors, sizes: LayerSizes, S: int, T: int, case: Case) -> AttentionProblem:
    groups = case.groups or sizes.num_kv_heads
    sizes = replace(sizes, num_kv_heads=groups, num_heads=groups * sizes.heads_per_group)
    M, G, D, B = groups, sizes.heads_per_group, sizes.head_dim, sizes.block_size
    index = make_selection(tensors, sizes, S, T, sizes.index_head_dim)
    window = None
    if case.window_blocks:
        # not whole blocks: the oldest is seen in part
        size = {"block_size": B, "window": case.window_blocks * B - B // 3, "sink_blocks": 1}
        ids, window = window_blocks(index.position, index.first_token, num_blocks=S // B, **size)
        ids = ids[:, None].expand(-1, M, -1)
        mask = window_mask(index.position, index.first_token, seq_len=S, **size)[:, None].expand(-1, M, -1)
    else:
        ids = exact_selection(
            index.q, index.k, index.position, index.first_token, block_size=B, topk=sizes.topk
        )
        mask = selection_mask(ids.cpu(), index.position.cpu(), seq_len=S, block_size=B).to(index.q.device)
    inputs = (tensors.normal(T, M, G, D), tensors.normal(S, M, D), tensors.normal(S, M, D), index.q, index.k)
    return AttentionProblem(inputs, tensors.normal(T, M, G, D), index.position, ids, mask, window, B, case)


def _limits(problem: AttentionProblem, kernel: str) -> list[Change]:
    """List the changes that make launches take queries in portions, lists in parts and so on."""
    if kernel != "triton":
        return []
    q, (T, M, K), case = problem.inputs[0], problem.block_indices.shape, problem.case
    size = q.element_size()
    pairs, row_bytes = T * M * K // case.portions, q.shape[2] * q.shape[3] * size
    kl_bytes = 4 * problem.block_size + problem.inputs[4].shape[1] * size
    changes: list[Change] = [(_CONFIGS, "UNION_SHARE", math.inf if case.queries_first else 0.0)]
    if case.portions > 1:
        changes.append((_FORWARD, "FORWARD_PART_BYTES", pairs * row_bytes))
        changes.append((_BACKWARD, "BACKWARD_PART_BYTES", pairs * (row_bytes + kl_bytes)))
    if case.split_lists:
        # a quarter of the queries of a portion that select a block, on average
        item = max(1, T * K * problem.block_size // (problem.inputs[1].shape[0] * case.portions * 4))
        changes += [(_FORWARD, "FORWARD_PAIRS_PER_ITEM", item), (_BACKWARD, "BACKWARD_PAIRS_PER_ITEM", item)]
    return changes


def _pool_run(problem: AttentionProblem, kernel: str) -> tuple[Tensor, ...]:
    """Return what NAMES lists, by the operators over pools that hold all blocks together."""
    q, k, _, q_index, k_index = problem.inputs
    B, M = problem.block_size, problem.block_indices.shape[1]
    S, indexed, temperature = k.shape[0], problem.window is None, problem.case.temperature
    queries = SparseQueries(
        q, problem.position, problem.scales["softmax_scale"],
        q_index if indexed else None, k_index.view(S // B, B, -1) if indexed else None,
        problem.scales["index_scale"] / temperature, temperature, problem.window,
    )  # fmt: skip
    pools = [_pool(problem, number) for number in range(problem.case.num_pools)]
    merged: PoolOutput | None = None
    for _, pool, block_table in pools:
        merged = pool_forward(queries, pool, block_table, total=merged, kernel=kernel)
    assert merged is not None, "a case has a pool"
    dout = problem.dout.to(merged.out.dtype)
    delta = (dout * merged.out).sum(-1)
    term = None
    if merged.lse_index is not None:
        term = KlTerm(merged.lse_index, 1.0, merged.lse_teacher)
    dq, kl = torch.zeros_like(merged.out), torch.zeros(1, dtype=torch.float64, device=q.device)
    dq_index = torch.zeros(q_index.shape, dtype=dout.dtype, device=q.device)
    dkv = torch.zeros(M * S // B, 2, B, q.shape[-1], dtype=dout.dtype, device=q.device)
    dk_index = torch.zeros(M * S // B, B, k_index.shape[-1], dtype=dout.dtype, device=q.device)
    for pairs, pool, block_table in pools:
        grads = pool_backward(queries, pool, block_table, dout, delta, merged.lse, term, kernel=kernel)
        dq += grads.dq
        dkv[pairs] = grads.dkv
        if term is not None and grads.dq_index is not None and grads.dk_index is not None:
            assert grads.kl is not None, "called with a KL term"
            dq_index += grads.dq_index
            dk_index[pairs] = grads.dk_index
            kl += grads.kl
    dk, dv = unpack_blocks(dkv, M)
    attention = (merged.out, dq, dk, dv)
    return attention if term is None else (*attention, dq_index, dk_index.view(M, S, -1).sum(0), kl)


def _pool(problem: AttentionProblem, number: int) -> tuple[Tensor, BlockPool, Tensor]:
    """Return the pairs (group, block) of a pool, the pool, and the block table of the queries in it."""
    _, k, v, _, _ = problem.inputs
    ids, device = problem.block_indices.long(), k.device
    NB, M = k.shape[0] // problem.block_size, k.shape[1]
    pairs = torch.arange(M * NB, device=device)
    pairs = pairs[pairs % problem.case.num_pools == number]
    physical_block = torch.full((M * NB,), -1, device=device)
    physical_block[pairs] = torch.arange(len(pairs), device=device)
    pair = ids.clamp(min=0) + torch.arange(M, device=device)[:, None] * NB
    block_table = torch.where(ids >= 0, physical_block[pair], -1)
    kv = pack_blocks(k, v, problem.block_size)[pairs].contiguous()
    return pairs, BlockPool(kv, (pairs % NB).contiguous()), block_table


def _plain_run(problem: AttentionProblem, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the same by the definitions with a mask over all tokens and autograd, all in one dtype."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in problem.inputs]
    q, k, v, q_index, k_index = leaves
    scale, temperature = problem.scales["softmax_scale"], problem.case.temperature
    out, _ = attention_reference(q, k, v, problem.mask, softmax_scale=scale)
    grads = torch.autograd.grad(out, leaves[:3], problem.dout.to(dtype))
    if problem.window is not None:
        return out.detach(), *grads
    kl = kl_reference(
        q, k, q_index, k_index, problem.mask,
        softmax_scale=scale / temperature, index_scale=problem.scales["index_scale"] / temperature,
    )  # fmt: skip
    return out.detach(), *grads, *torch.autograd.grad(kl, leaves[3:]), kl.detach().view(1)

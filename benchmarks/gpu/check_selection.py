"""Check block selection: some queries of two documents against all keys."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from msa_kernels import select_blocks
from msa_kernels.block_sparse_attention.reference import selection_mask
from msa_kernels.select_blocks.types import SelectionArgs
from torch import Tensor

from benchmarks.gpu.comparison import SCORE_ROUNDING, Check, selection_check, worst_row
from benchmarks.gpu.problem import LayerSizes, Tensors

# Index head dims that fit one product each in fp32, whose digits tensor cores would drop.
FP32_DIMS = (16, 32, 128)


@dataclass(slots=True)
class SelectionProblem:
    """Hold index queries [T, M, Di] at `position` [T], index keys [S, Di] of two documents."""

    q: Tensor
    k: Tensor
    position: Tensor
    cu_seqlens: Tensor

    @property
    def first_token(self) -> Tensor:
        """Find where each query's document begins, [T] int64."""
        starts = self.cu_seqlens.to(self.position.device)
        return starts[torch.searchsorted(starts, self.position, right=True) - 1]


def make_selection(
    tensors: Tensors, sizes: LayerSizes, seq_len: int, num_queries: int, dim: int
) -> SelectionProblem:
    """Make queries at random positions, ascending."""
    order = torch.randperm(seq_len, generator=tensors.generator, device=tensors.device)
    border = seq_len // 4 // sizes.block_size * sizes.block_size
    return SelectionProblem(
        q=tensors.normal(num_queries, sizes.num_kv_heads, dim),
        k=tensors.normal(seq_len, dim),
        position=order[:num_queries].sort().values,
        cu_seqlens=torch.tensor([0, border, seq_len]),
    )


def selection_cases(
    tensors: Tensors, sizes: LayerSizes, kernel: str, *, seq_len: int, num_queries: int
) -> dict[str, Callable[[], list[Check]]]:
    """Return the cases by name."""

    def make(dim: int = 0, values: Tensors = tensors) -> SelectionProblem:
        return make_selection(values, sizes, seq_len, num_queries, dim or sizes.index_head_dim)

    cases = {
        "selection": lambda: [_selection("selection", make(), sizes, kernel)],
        "selection, ranges divided": lambda: [
            _selection("selection, ranges divided", make(), sizes, kernel, num_splits=3)
        ],
        "selected log-sum-exp": lambda: [_selected_lse(make(), sizes, kernel)],
    }
    wide = Tensors(tensors.device, torch.float32, int(tensors.generator.initial_seed()))
    for dim in FP32_DIMS:
        name = f"selection in fp32, {dim} channels"
        cases[name] = lambda name=name, dim=dim: [_selection(name, make(dim, wide), sizes, kernel)]
    return cases


def _selection(
    name: str, problem: SelectionProblem, sizes: LayerSizes, kernel: str, num_splits: int | None = None
) -> Check:
    ids = _select(problem, sizes, kernel, num_splits)
    scores = torch.einsum("tmd,sd->tms", problem.q.double(), problem.k.double())
    scores = scores.unflatten(-1, (-1, sizes.block_size)).amax(-1)
    first, own = problem.first_token // sizes.block_size, problem.position // sizes.block_size
    return selection_check(name, scores, ids, first, own, sizes.topk)


def _select(problem: SelectionProblem, sizes: LayerSizes, kernel: str, num_splits: int | None) -> Tensor:
    shape = {"block_size": sizes.block_size, "topk": sizes.topk, "position": problem.position}
    tensors = (problem.q, problem.k, problem.cu_seqlens)
    if num_splits is None or kernel != "triton":
        return select_blocks(*tensors, **shape, kernel=kernel)
    # the operator itself divides ranges where there are few rows
    from msa_kernels.select_blocks.triton.launch import select_blocks_triton

    return select_blocks_triton(SelectionArgs(*tensors, **shape), num_splits=num_splits)[0]


def _selected_lse(problem: SelectionProblem, sizes: LayerSizes, kernel: str) -> Check:
    """Check the log-sum-exp over the blocks that the kernel itself took; relative to the largest."""
    scale, S = sizes.index_head_dim**-0.5, problem.k.shape[0]
    ids, lse = select_blocks(
        problem.q, problem.k, problem.cu_seqlens, block_size=sizes.block_size, topk=sizes.topk,
        position=problem.position, kernel=kernel, return_lse=True, index_scale=scale,
    )  # fmt: skip
    mask = selection_mask(ids.cpu(), problem.position.cpu(), seq_len=S, block_size=sizes.block_size)
    scores = torch.einsum("tmd,sd->tms", problem.q.double(), problem.k.double()) * scale
    exact = scores.masked_fill(~mask.to(scores.device), float("-inf")).logsumexp(-1)
    return Check("selected log-sum-exp", worst_row(lse, exact), SCORE_ROUNDING * float(exact.abs().max()))

"""The forward kernel that takes queries first, and results of several pools merged where they are formed."""

import dataclasses

import pytest
import torch
from msa_kernels.block_sparse_attention import configs
from msa_kernels.block_sparse_attention.across_pools import output_delta
from msa_kernels.block_sparse_attention.tiled import pool_forward
from msa_kernels.block_sparse_attention.types import PoolOutput
from torch import Tensor

from tests.helpers.compare import assert_rows_close
from tests.helpers.pool_problems import PoolProblem, Shape, attend, make_problem, to_dtype
from tests.helpers.triton_env import DTYPES, needs_triton, run_triton
from tests.kernels.test_triton_block_sparse_attention import (
    SHAPES,
    assert_outputs_equal,
    limits,
    nan_filled_buffers,
)

NEVER, ALWAYS = 0.0, float("inf")
# The interpreter multiplies fp32 as it is; on a GPU such tiles spill, and the product has none.
IN_FP32 = configs.TileConfig(128, 128, 4, rows=32, num_warps=8, num_stages=1)
FIRST = {"blocks_first": NEVER, "queries_first": ALWAYS}
# blocks that no step of the kernel divides, and head dims beyond its tiles: the other kernels serve them
NOT_SERVED = ("odd_sizes", "block_in_parts", "separate")


def attend_in_turn(problem: PoolProblem, shape: Shape, share: float) -> tuple[PoolOutput, set[str]]:
    """Give each pool the result over those before it; also the names of the kernels that were launched."""
    from msa_kernels import operators

    launched = set()
    total: PoolOutput | None = None
    with nan_filled_buffers(), limits(shape), pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "UNION_SHARE", share)
        patch.setattr(configs, "UNION", (*configs.UNION, IN_FP32))
        init = operators.Launched.__init__

        def noted(self: operators.Launched, kernel: object) -> None:
            init(self, kernel)
            launched.add(operators._name(kernel))

        patch.setattr(operators.Launched, "__init__", noted)
        for pool, block_table in zip(problem.pools, problem.block_tables, strict=True):
            total = pool_forward(problem.queries, pool, block_table, total=total, kernel="triton")
    assert total is not None, "a problem has a pool"
    return total, launched


@needs_triton
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("num_pools", [1, 3])
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.float32) for name in SHAPES] + [("plain", DTYPES[-1])]
)
def test_equals_the_definition(name: str, dtype: torch.dtype, num_pools: int, first: str) -> None:
    shape = dataclasses.replace(SHAPES[name], num_pools=num_pools)
    problem = make_problem(shape, dtype)
    got, launched = run_triton(attend_in_turn, problem, shape, FIRST[first])
    assert ("attend_union_kernel" in launched) == (first == "queries_first" and name not in NOT_SERVED)
    want = attend(to_dtype(problem, torch.float64), "reference")
    assert_outputs_equal(got, want, dtype)


def attend_with(problem: PoolProblem, share: float) -> tuple[Tensor, int]:
    """The output, and 1 where the queries-first kernel has formed it."""
    from msa_kernels.block_sparse_attention.triton import launch_forward, launch_union

    chosen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "UNION_SHARE", share)
        patch.setattr(configs, "UNION", (*configs.UNION, IN_FP32))

        def noted(portion: object) -> object:
            work = launch_union.find_union(portion)
            chosen.append(int(work.chosen))
            return work

        patch.setattr(launch_forward, "find_union", noted)
        out = pool_forward(problem.queries, problem.pools[0], problem.block_tables[0], kernel="triton").out
    return out, chosen[0]


@needs_triton
def test_choice_follows_the_selections() -> None:
    """Queries that select alike go first, others do not, and the results agree."""
    shape = Shape(seq_len=256, num_queries=32, starts=(0, 256), topk=4, groups=1, heads=16, seed=3)
    alike = make_problem(shape, torch.float32)
    # all queries of this problem read what the first one reads
    alike.block_tables[0][:] = alike.block_tables[0][:1]
    apart = make_problem(shape, torch.float32)
    for problem, expected in ((alike, 1), (apart, 0)):
        out, chosen = run_triton(attend_with, problem, 1.2)
        assert chosen == expected
        assert_rows_close(out, attend(to_dtype(problem, torch.float64), "reference").out, 2e-6)


def union_of(block_table: Tensor, block: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where Triton can be imported."""
    from msa_kernels.block_sparse_attention.triton.union import build_union

    union = build_union(block_table, block, 16, num_queries)
    return union.block, union.token, union.readers, union.size


@needs_triton
def test_union_example() -> None:
    """The example of the docstring."""
    block_table = torch.tensor([[0, 1], [1, -1], [1, 3]])[:, None]
    block, token, readers, size = run_triton(union_of, block_table, torch.tensor([5, 6, 7, 8]), 2)
    assert size.tolist() == [[2, 2]]
    assert block[0, :, :2].tolist() == [[0, 1], [1, 3]]
    assert readers[0, :, :2].tolist() == [[1, 3], [1, 1]]
    assert token[0, :, :2].tolist() == [[80, 96], [96, 128]]


@needs_triton
def test_union_holds_every_pair() -> None:
    """Each (query, KV head, block) of the table, no other, each block once."""
    shape = Shape(groups=3, num_queries=50, topk=3)
    problem = make_problem(shape, torch.float32)
    table, pool = problem.block_tables[0], problem.pools[0]
    block, _, readers, size = run_triton(union_of, table, pool.block, 8)
    found = set()
    for head, tile in ((m, t) for m in range(3) for t in range(7)):
        blocks = block[head, tile, : size[head, tile]].tolist()
        assert sorted(set(blocks)) == blocks
        for one, bits in zip(blocks, readers[head, tile].tolist(), strict=False):
            found |= {(8 * tile + i, head, one) for i in range(8) if bits >> i & 1}
    want = {(t, m, int(one)) for t in range(50) for m in range(3) for one in table[t, m] if one >= 0}
    assert found == want


def delta_by(kernel: str, dout: Tensor, out: Tensor) -> Tensor:
    """Where kernels run."""
    return output_delta(dout, out, kernel=kernel)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_delta(dtype: torch.dtype) -> None:
    """In fp32 whatever the inputs are, strided ones too."""
    random = torch.Generator().manual_seed(0)
    dout, out = (torch.randn(7, 3, 20, 5, generator=random).to(dtype).transpose(2, 3) for _ in range(2))
    want = (dout.double() * out.double()).sum(-1)
    for kernel in ("triton", "cpu"):
        got = run_triton(delta_by, kernel, dout, out)
        assert got.dtype == torch.float32
        assert_rows_close(got, want, 1e-6)

"""Tensors that kernels read by address: any layout is taken, a dtype that would be misread is refused."""

import dataclasses
from typing import Any

import pytest
import torch
from msa_kernels import select_blocks
from msa_kernels.block_sparse_attention.types import PoolGrads
from torch import Tensor

from tests.helpers.pool_problems import PoolProblem, Shape, make_problem
from tests.helpers.triton_env import needs_triton, run_triton
from tests.kernels import test_triton_decode as decode
from tests.kernels import test_triton_dense_kl as dense_kl
from tests.kernels.test_triton_block_sparse_attention import run_pools

pytestmark = needs_triton
POOLS = Shape(
    window=21, topk=4, num_queries=9, seq_len=48, starts=(0, 48), groups=1, heads=1, part_bytes=2**11
)


def strided(tensor: Tensor) -> Tensor:
    """The same values, with others between them."""
    return torch.stack((tensor, torch.full_like(tensor, 1)), -1)[..., 0]


def _with_indices(problem: PoolProblem, change: Any) -> PoolProblem:
    """The problem with `change` applied to block ids, positions and borders of windows."""
    queries, window = problem.queries, problem.queries.window
    assert window is not None
    window = dataclasses.replace(window, start=change(window.start), sink_stop=change(window.sink_stop))
    return dataclasses.replace(
        problem,
        queries=dataclasses.replace(queries, position=change(queries.position), window=window),
        pools=[dataclasses.replace(pool, block=change(pool.block)) for pool in problem.pools],
    )


def test_block_sparse_attention_takes_strided_indices() -> None:
    problem = make_problem(POOLS, torch.float32)
    changed = _with_indices(problem, strided)
    changed.block_tables = [strided(block_table) for block_table in changed.block_tables]
    want, got = (run_triton(run_pools, each, POOLS) for each in (problem, changed))
    assert torch.equal(got[0].out, want[0].out)
    for field in dataclasses.fields(PoolGrads):
        assert torch.equal(getattr(got[1][0], field.name), getattr(want[1][0], field.name)), field.name


@pytest.mark.parametrize("name", ["pool.block", "queries.position", "window.start", "window.sink_stop"])
def test_block_sparse_attention_refuses_int32(name: str) -> None:
    problem = make_problem(POOLS, torch.float32)
    owner: Any = problem.queries
    if name == "pool.block":
        owner = problem.pools[0]
    elif name.startswith("window"):
        owner = problem.queries.window
    field = name.split(".")[1]
    setattr(owner, field, getattr(owner, field).int())
    with pytest.raises(ValueError, match=rf"{name}\.dtype=torch\.int32: must be int64; convert it"):
        run_triton(run_pools, problem, POOLS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_select_blocks_takes_strided_indices(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(5, 2, 16, generator=generator), torch.randn(160, 16, generator=generator)
    starts, where = torch.tensor([0, 48, 64, 160], dtype=dtype), torch.tensor([3, 50, 70, 100, 159])
    valid = torch.tensor([True, True, False, True, True])
    arguments: dict[str, Any] = {"block_size": 16, "topk": 3, "return_lse": True}
    want = select_blocks(q, k, starts, position=where, query_valid=valid, kernel="reference", **arguments)
    got = run_triton(
        select_blocks, q, k, strided(starts),
        position=strided(where.to(dtype)), query_valid=strided(valid), kernel="triton", **arguments,
    )  # fmt: skip
    assert torch.equal(got[0], want[0])
    assert torch.allclose(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_decode_takes_strided_lengths_and_pages(dtype: torch.dtype) -> None:
    rows = decode._rows((4, 32, 1, 16), 16, [32] * 4, torch.float32)
    queries = decode._queries(2, 2, 1, 16, 16, torch.float32)
    table, lengths = torch.tensor([[2, 0], [3, 1]], dtype=dtype), torch.tensor([60, 37], dtype=dtype)
    arguments: dict[str, Any] = {"block_size": 16, "topk": 3}
    want = decode._decode(rows, table, *queries, lengths, kernel="reference", **arguments)
    strided_inputs = (strided(table), *queries, strided(lengths))
    got = run_triton(decode._decode, rows, *strided_inputs, kernel="triton", **arguments)
    assert torch.equal(got[2], want[2])
    assert torch.allclose(got[0], want[0], atol=1e-6)
    assert torch.allclose(got[1], want[1], atol=1e-6)


def _dense_kl(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the place where kernels run."""
    from msa_kernels.dense_kl.op import dense_kl_part

    grads = dense_kl_part(
        *inputs, causal=True, softmax_scale=0.2, index_scale=0.4, kernel="triton"
    )  # fmt: skip
    return grads.dq_index, grads.dk_index, grads.kl


def test_dense_kl_takes_any_lse() -> None:
    q, k, q_index, k_index = dense_kl._draw((40, 0, 2, 2, 16, 16), torch.float32)
    q, k, q_index = q.permute(1, 2, 0, 3), k.transpose(0, 1), q_index.transpose(0, 1)
    lse, lse_index = torch.full((2, 2, 40), 9.0), torch.full((2, 40), 9.0)
    lse += torch.arange(40) / 8
    want = run_triton(_dense_kl, q, k, lse, q_index, k_index, lse_index)
    got = run_triton(_dense_kl, q, k, strided(lse), q_index, k_index, strided(lse_index).double())
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)

"""Block-sparse attention, its gradients and the KL loss against plain masked attention in fp64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from msa_kernels import block_sparse_attention, select_blocks
from msa_kernels.block_sparse_attention import tiled_chunk as pool_module
from msa_kernels.block_sparse_attention.op import pack_blocks, unpack_blocks
from msa_kernels.block_sparse_attention.reference import (
    attention_reference,
    kl_reference,
    selection_mask,
)
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, SparseQueries
from msa_kernels.block_sparse_attention.work_list import build_work_list
from torch import Tensor

from tests.helpers.compare import assert_rows_close
from tests.helpers.pool_problems import (
    Shape,
    assert_equal_without_value,
    attend,
    attend_backward,
    make_problem,
)


def make(seq_len: int, groups: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seq_len + dim)
    shapes = [(seq_len, groups * heads, dim), (seq_len, groups, dim), (seq_len, groups, dim)]
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


def select(seq_len: int, groups: int, block_size: int, topk: int, starts: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(seq_len, groups, 8, generator=generator)
    k = torch.randn(seq_len, 8, generator=generator)
    valid = torch.ones(seq_len, dtype=torch.bool)
    valid[-3:] = False
    return select_blocks(q, k, torch.tensor(starts), block_size=block_size, topk=topk, query_valid=valid)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(
    ("block_size", "topk", "starts"),
    [(4, 3, [0, 96]), (8, 2, [0, 8, 48, 96]), (16, 16, [0, 96]), (32, 1, [0, 32, 64, 96])],
    ids=["sparse", "packed", "dense", "local_only"],
)
def test_equals_masked_attention(
    groups: int, block_size: int, topk: int, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small tiles, so that several chunks, batches and half-filled items occur.
    monkeypatch.setattr(pool_module, "_SLOT_ELEMENTS", 4096)
    monkeypatch.setattr(pool_module, "_TILE_ELEMENTS", 4096)
    S, G, D = 96, 2, 10
    q, k, v = (x.requires_grad_() for x in make(S, groups, G, D, torch.float64))
    block_indices = select(S, groups, block_size, topk, starts)
    out, lse = block_sparse_attention(q, k, v, block_indices, block_size=block_size)
    mask = selection_mask(block_indices, torch.arange(S), seq_len=S, block_size=block_size)
    expected, expected_lse = attention_reference(q.view(S, groups, G, D), k, v, mask, softmax_scale=D**-0.5)
    assert_rows_close(out, expected.flatten(1, 2), 1e-12)
    assert torch.equal(out[-3:], torch.zeros_like(out[-3:]))
    assert (lse[-3:] == float("-inf")).all()
    assert_rows_close(lse[:-3], expected_lse.flatten(1)[:-3], 1e-12)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    got = torch.autograd.grad(out, (q, k, v), dout)
    want = torch.autograd.grad(expected.flatten(1, 2)[:-3], (q, k, v), dout[:-3])
    for a, b in zip(got, want, strict=True):
        assert_rows_close(a, b, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_at_most_twice_the_error_of_torch(dtype: torch.dtype) -> None:
    """Worst row against fp64 must be within twice that of a plain torch run in the same dtype."""
    S, M, G, D, block_size = 192, 2, 4, 32, 16
    exact = make(S, M, G, D, torch.float64)
    low = [x.to(dtype).requires_grad_() for x in exact]
    wide = [x.detach().double().requires_grad_() for x in low]
    plain = [x.detach().clone().requires_grad_() for x in low]
    block_indices = select(S, M, block_size, 4, [0, 64, 192])
    mask = selection_mask(block_indices, torch.arange(S), seq_len=S, block_size=block_size)
    mask = mask.clone()
    mask[-3:, :, 0] = True  # a row without keys is NaN in plain softmax; it is left out below
    dout = torch.randn(S, M * G, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dout[-3:] = 0

    def plain_run(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, v = tensors
        out = attention_reference(q.view(S, M, G, D), k, v, mask, softmax_scale=D**-0.5)[0].flatten(1, 2)
        return out[:-3], *torch.autograd.grad(out, tensors, dout.to(out.dtype))

    out, _ = block_sparse_attention(*low, block_indices, block_size=block_size)
    got = (out[:-3], *torch.autograd.grad(out, low, dout.to(dtype)))
    for name, a, b, c in zip(["out", "dq", "dk", "dv"], got, plain_run(plain), plain_run(wide), strict=True):
        ours, theirs = (a.double() - c).abs().amax(-1).max(), (b.double() - c).abs().amax(-1).max()
        assert ours <= 2 * theirs + 1e-12, f"{name}: {ours:.3g} against {theirs:.3g}"


@pytest.mark.parametrize("starts", [[0, 64], [0, 24, 40, 64]], ids=["one", "packed"])
def test_kl_value_and_gradients(starts: list[int]) -> None:
    """The KL term equals autograd through the definition; d ds sums to zero over a query's tokens."""
    S, M, G, D, Di, block_size, scale = 64, 2, 3, 6, 5, 8, 0.7
    q, k, v = make(S, M, G, D, torch.float64)
    generator = torch.Generator().manual_seed(5)
    q_index = torch.randn(S, M, Di, generator=generator, dtype=torch.float64, requires_grad=True)
    k_index = torch.randn(S, Di, generator=generator, dtype=torch.float64, requires_grad=True)
    block_indices = select(S, M, block_size, 3, starts)
    mask = selection_mask(block_indices, torch.arange(S), seq_len=S, block_size=block_size)
    q4 = q.view(S, M, G, D)
    expected = kl_reference(q4, k, q_index, k_index, mask, softmax_scale=scale, index_scale=0.4)
    want = torch.autograd.grad(0.25 * expected, (q_index, k_index))

    queries = SparseQueries(
        q=q4,
        position=torch.arange(S),
        softmax_scale=scale,
        q_index=q_index.detach(),
        k_index=k_index.detach().view(-1, block_size, Di),
        index_scale=0.4,
    )
    blocks = torch.arange(S // block_size).repeat(M)
    pool = BlockPool(kv=pack_blocks(k, v, block_size), block=blocks)
    ids = block_indices.long()
    block_table = torch.where(ids >= 0, ids + torch.arange(M)[:, None] * (S // block_size), -1)
    result = pool_forward(queries, pool, block_table)
    assert result.lse_index is not None
    zero = torch.zeros_like(result.out)
    grads = pool_backward(
        queries,
        pool,
        block_table,
        zero,
        zero.sum(-1),
        result.lse,
        KlTerm(lse_index=result.lse_index, weight=0.25),
    )
    assert grads.kl is not None
    assert grads.dq_index is not None
    assert grads.dk_index is not None
    assert abs(float(grads.kl) - float(expected)) < 1e-11 * abs(float(expected))
    assert_rows_close(grads.dq_index, want[0], 1e-12)
    dk_index = grads.dk_index.view(M, -1, block_size, Di).sum(0).flatten(0, 1)
    assert_rows_close(dk_index, want[1], 1e-12)
    assert not grads.dq.any()
    # Constant index keys move no probability: then dq_index is k * sum_j ds_j, which must vanish.
    queries.k_index = torch.ones_like(queries.k_index) if queries.k_index is not None else None
    result = pool_forward(queries, pool, block_table)
    assert result.lse_index is not None
    term = KlTerm(lse_index=result.lse_index, weight=1.0)
    grads = pool_backward(queries, pool, block_table, zero, zero.sum(-1), result.lse, term)
    assert grads.dq_index is not None
    assert grads.dq_index.abs().max() < 1e-13


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_gradients_do_not_need_the_value(kernel: str) -> None:
    problem = make_problem(Shape(temperature=2.0, num_pools=2), torch.float64)
    merged = attend(problem, kernel)
    want = attend_backward(problem, merged, kernel)
    got = attend_backward(replace(problem, with_kl_value=False), merged, kernel)
    assert_equal_without_value(got, want)


def test_unselected_block_gets_zero_gradient() -> None:
    S, block_size = 64, 8
    q, k, v = (x.requires_grad_() for x in make(S, 1, 2, 8, torch.float64))
    block_indices = torch.arange(S).div(block_size, rounding_mode="floor").view(S, 1, 1).int()
    block_indices[8:16] = -1
    out, _ = block_sparse_attention(q, k, v, block_indices, block_size=block_size)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    for gradient in (dq, dk, dv):
        assert not gradient[8:16].any()
        assert torch.isfinite(gradient).all()


def test_pack_round_trip() -> None:
    _, k, v = make(48, 3, 1, 4, torch.float32)
    kv = pack_blocks(k, v, 8)
    assert torch.equal(kv[1 * 6 + 2, 0], k[16:24, 1])
    assert all(torch.equal(a, b) for a, b in zip(unpack_blocks(kv, 3), (k, v), strict=True))


def test_work_list_example() -> None:
    """The example of the docstring."""
    block_table = torch.tensor([[5, 7], [7, -1], [7, 5]])
    work = build_work_list(block_table, block_table >= 0, num_physical_blocks=9, rows_per_item=2)
    assert work.pair.tolist() == [[0, 5], [1, 2], [4, -1]]
    assert work.physical_block.tolist() == [5, 7, 7]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((16, 4, 8), (16, 3, 8), (16, 3, 2)), "num_heads=4"),
        (((16, 4, 8), (16, 2, 8), (16, 3, 2)), "block_indices.shape"),
        (((16, 4, 8), (18, 2, 8), (16, 2, 2)), "S=18"),
        (((16, 4, 8), (16, 2, 4), (16, 2, 2)), "q.shape"),
    ],
)
def test_bad_arguments(shapes: tuple[tuple[int, ...], ...], words: str) -> None:
    q, k = torch.zeros(shapes[0]), torch.zeros(shapes[1])
    with pytest.raises(ValueError, match=words):
        block_sparse_attention(q, k, k, torch.zeros(shapes[2], dtype=torch.int32), block_size=4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": "triton"}, "kernel=triton"),
        ({"kernel": "cuda"}, "kernel=cuda: must be one of auto, triton, cpu, reference"),
        ({"block_size": 0}, "block_size=0: must be at least 1"),
        ({"query_offset": 1}, "query_offset=1"),
        ({"softmax_scale": 0.0}, "softmax_scale=0.0: must be above 0"),
        ({"q": torch.zeros(16, 4, 8, dtype=torch.int64)}, "q.dtype=torch.int64"),
        ({"v": torch.zeros(16, 2, 8, device="meta")}, "v.device=meta"),
        ({"block_indices": torch.zeros(16, 2, 2)}, "block_indices.dtype=torch.float32"),
        ({"block_indices": torch.full((16, 2, 2), 4)}, "block_indices=4: must be from 0 to"),
        ({"block_indices": torch.full((16, 2, 2), -2)}, "block_indices=-2"),
    ],
)
def test_bad_values(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(16, 4, 8, dtype=torch.float64),
        "k": torch.zeros(16, 2, 8, dtype=torch.float64),
        "v": torch.zeros(16, 2, 8, dtype=torch.float64),
        "block_indices": torch.zeros(16, 2, 2, dtype=torch.int32),
        "block_size": 4,
    }
    with pytest.raises(ValueError, match=words):
        block_sparse_attention(**(arguments | change))


def test_reference_equals_the_tiled_path() -> None:
    q, k, v = (x.requires_grad_() for x in make(96, 2, 3, 10, torch.float64))
    block_indices = select(96, 2, 8, 3, [0, 48, 96])
    results = []
    for kernel in ("reference", "cpu"):
        out, lse = block_sparse_attention(q, k, v, block_indices, block_size=8, kernel=kernel)
        results.append((out, lse[:-3], *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        assert_rows_close(a, b, 1e-12)

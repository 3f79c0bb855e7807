"""Triton kernels have at most twice the error of plain torch in the same dtype: worst row, against fp64."""

from typing import Any

import pytest
import torch
from msa_kernels import select_blocks
from msa_kernels.block_sparse_attention.op import pack_blocks, unpack_blocks
from msa_kernels.block_sparse_attention.reference import attention_reference, kl_reference, selection_mask
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, SparseQueries
from torch import Tensor

from tests.helpers.triton_env import DTYPES, needs_triton, run_triton

S, M, G, D, DI, BLOCK_SIZE = 96, 2, 4, 32, 16, 16
SCALES = {"softmax_scale": D**-0.5, "index_scale": DI**-0.5}
NAMES = ("out", "dq", "dk", "dv", "dq_index", "dk_index", "kl")


def problem() -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v, q_index, k_index; dout; the selection. Two documents."""
    random = torch.Generator().manual_seed(11)
    shapes = [(S, M, G, D), (S, M, D), (S, M, D), (S, M, DI), (S, DI), (S, M, G, D)]
    *tensors, dout = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    ids = select_blocks(tensors[3], tensors[4], torch.tensor([0, 32, S]), block_size=BLOCK_SIZE, topk=3)
    return tensors, dout, ids


def pool_run(tensors: list[Tensor], dout: Tensor, ids: Tensor, kernel: str) -> tuple[Tensor, ...]:
    """Over all blocks as one pool; the values that NAMES lists."""
    q, k, v, q_index, k_index = tensors
    NB = S // BLOCK_SIZE
    queries = SparseQueries(
        q, torch.arange(S, device=q.device), SCALES["softmax_scale"],
        q_index, k_index.view(NB, BLOCK_SIZE, DI), SCALES["index_scale"],
    )  # fmt: skip
    pool = BlockPool(pack_blocks(k, v, BLOCK_SIZE), torch.arange(NB, device=q.device).repeat(M))
    group = torch.arange(M, device=q.device)[:, None]
    block_table = torch.where(ids >= 0, ids.long() + group * NB, -1)
    part = pool_forward(queries, pool, block_table, kernel=kernel)
    assert part.lse_index is not None
    dout = dout.to(part.out.dtype)
    term = KlTerm(part.lse_index, weight=1.0)
    grads = pool_backward(
        queries, pool, block_table, dout, (dout * part.out).sum(-1), part.lse, term, kernel=kernel
    )
    assert grads.dk_index is not None
    assert grads.dq_index is not None
    assert grads.kl is not None
    dk, dv = unpack_blocks(grads.dkv, M)
    dk_index = grads.dk_index.view(M, S, DI).sum(0)
    return part.out, grads.dq, dk, dv, grads.dq_index, dk_index, grads.kl.view(1)


def plain_run(tensors: list[Tensor], dout: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """The definitions with a mask over the whole sequence, gradients by autograd, all in the given dtype."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    q, k, v, q_index, k_index = leaves
    mask = selection_mask(ids, torch.arange(S), seq_len=S, block_size=BLOCK_SIZE)
    out, _ = attention_reference(q, k, v, mask, softmax_scale=SCALES["softmax_scale"])
    kl = kl_reference(q, k, q_index, k_index, mask, **SCALES)
    grads = torch.autograd.grad((out, kl), leaves, (dout, torch.ones_like(kl)))
    return out, *grads, kl.view(1)


def error(got: Tensor, want: Tensor) -> float:
    """Of the worst row."""
    return float((got.double() - want).abs().max())


def check(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Fail unless every error is at most twice that of torch.

    torch may hit a single number, the loss, by chance: its own rounding in fp32 is allowed too.
    """
    for name, a, b, c in zip(NAMES, ours, theirs, exact, strict=True):
        rounding = 2.0**-23 * float(c.abs()) if name == "kl" else 0.0
        assert error(a, c) <= 2 * error(b, c) + rounding, f"{name}: {error(a, c):.3g}, {error(b, c):.3g}"


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_most_twice_the_error_of_torch(dtype: torch.dtype) -> None:
    tensors, dout, ids = problem()
    low: list[Any] = [tensor.to(dtype) for tensor in (*tensors, dout)]
    wide = [tensor.double() for tensor in low]
    ours = run_triton(pool_run, low[:-1], low[-1], ids, "triton")
    theirs = plain_run(low[:-1], low[-1], ids)
    exact = plain_run(wide[:-1], wide[-1], ids)
    check(ours, theirs, exact)


def test_cpu_path_has_no_more_either() -> None:
    """The tiled path in fp32, forward, backward and KL loss."""
    tensors, dout, ids = problem()
    low = [tensor.float() for tensor in (*tensors, dout)]
    wide = [tensor.double() for tensor in low]
    ours = pool_run(low[:-1], low[-1], ids, "cpu")
    theirs = plain_run(low[:-1], low[-1], ids)
    exact = plain_run(wide[:-1], wide[-1], ids)
    check(ours, theirs, exact)

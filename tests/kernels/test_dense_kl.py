"""The tiled KL loss over all causal tokens against autograd through the plain definition, in fp64."""

from typing import Any

import pytest
import torch
from msa_kernels.block_sparse_attention.reference import kl_reference
from msa_kernels.dense_kl.op import dense_kl_part, lse_part
from torch import Tensor

from tests.helpers.compare import assert_rows_close

M, G, D, DI = 2, 3, 8, 6


def draw(num_tokens: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [T, M, G, D], k [T, M, D], q_index [T, M, Di], k_index [T, Di]; peaked, so that mistakes show."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_tokens, M, G, D), (num_tokens, M, D), (num_tokens, M, DI), (num_tokens, DI))
    q, k, q_index, k_index = (2 * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q, k, q_index, k_index


def by_parts(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    first: int,
    scale: float,
    index_scale: float,
    with_value: bool = True,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries from `first` on, whose keys come as the part before `first` and the causal rest.

    dq_index [T - first, M, Di], dk_index [S, Di] and value, -1 without one.
    """
    heads, keys = q[first:].permute(1, 2, 0, 3), k.transpose(0, 1)
    index = q_index[first:].transpose(0, 1)
    parts = [(slice(0, first), False), (slice(first, None), True)]
    parts = [part for part in parts if keys[:, part[0]].shape[1]]
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(heads.shape[:-1], float("-inf"), dtype=dtype, device=q.device)
    lse_index = torch.full(index.shape[:-1], float("-inf"), dtype=dtype, device=q.device)
    for rows, causal in parts:
        options: dict[str, Any] = {"causal": causal, "kernel": kernel}
        lse = torch.logaddexp(lse, lse_part(heads, keys[:, rows], softmax_scale=scale, **options))
        share = lse_part(index.unsqueeze(1), k_index[None, rows], softmax_scale=index_scale, **options)
        lse_index = torch.logaddexp(lse_index, share.squeeze(1))
    dq, dk = torch.zeros_like(index, dtype=dtype), torch.zeros_like(k_index, dtype=dtype)
    kl = torch.zeros((), dtype=torch.float64, device=q.device)
    for rows, causal in parts:
        grads = dense_kl_part(
            heads, keys[:, rows], lse, index, k_index[rows], lse_index,
            causal=causal, softmax_scale=scale, index_scale=index_scale, with_value=with_value, kernel=kernel,
        )  # fmt: skip
        dq += grads.dq_index
        dk[rows] += grads.dk_index
        if grads.kl is None:
            kl.fill_(-1.0)
        else:
            kl += grads.kl
    return dq.transpose(0, 1), dk, kl


@pytest.mark.parametrize("num_tokens", [1, 7, 300, 1100])
@pytest.mark.parametrize("first_share", [0.0, 0.4])
@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_value_and_gradients(num_tokens: int, first_share: float, kernel: str) -> None:
    q, k, q_index, k_index = draw(num_tokens)
    first = int(num_tokens * first_share)
    scale, index_scale = D**-0.5, DI**-0.5
    dq, dk, kl = by_parts(
        q, k, q_index, k_index, first=first, scale=scale, index_scale=index_scale, kernel=kernel
    )
    leaves = q_index.requires_grad_(), k_index.requires_grad_()
    position = torch.arange(first, num_tokens)
    mask = (torch.arange(num_tokens) <= position[:, None])[:, None].expand(-1, M, -1)
    expected = kl_reference(
        q[first:], k, leaves[0][first:], leaves[1], mask, softmax_scale=scale, index_scale=index_scale
    )
    expected.backward()
    assert abs(float(kl) - float(expected.detach())) <= 1e-11 * max(float(expected.detach()), 1e-3)
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert_rows_close(dq, leaves[0].grad[first:], 1e-10)
    assert_rows_close(dk, leaves[1].grad, 1e-10)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_gradients_do_not_need_the_value(kernel: str) -> None:
    settings: dict[str, Any] = {"first": 120, "scale": 0.3, "index_scale": 0.4, "kernel": kernel}
    want = by_parts(*draw(300), **settings)
    got = by_parts(*draw(300), **settings, with_value=False)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert float(want[2]) > 0
    assert float(got[2]) == -1.0


def test_differences_of_a_row_sum_to_zero() -> None:
    """With one and the same index key everywhere, dq_index is that key times the sum of student - teacher."""
    q, k, q_index, k_index = draw(400)
    k_index[:] = k_index[0]
    dq, _, kl = by_parts(q, k, q_index, k_index, first=150, scale=D**-0.5, index_scale=1.0)
    assert float(dq.abs().max()) < 1e-12
    assert float(kl) > 1.0


def test_perfect_student_has_no_loss() -> None:
    """One head per group whose queries and keys the index branch copies: student equals teacher."""
    q, k, _, _ = draw(64)
    q, k = q[:, :1, :1], k[:, :1]
    dq, dk, kl = by_parts(q, k, q[:, :, 0], k[:, 0], first=0, scale=0.3, index_scale=0.3)
    assert abs(float(kl)) < 1e-12
    assert float(dq.abs().max()) < 1e-12
    assert float(dk.abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("kernel", "words"), [("fast", "kernel=fast"), ("triton", "kernel=triton")], ids=["unknown", "no_gpu"]
)
def test_kernel_that_is_not_there(kernel: str, words: str) -> None:
    q, k, _, _ = draw(4)
    with pytest.raises(ValueError, match=words):
        lse_part(q.permute(1, 2, 0, 3), k.transpose(0, 1), causal=True, softmax_scale=1.0, kernel=kernel)

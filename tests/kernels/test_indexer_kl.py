"""The KL loss by itself against its definition and autograd in fp64, and what it refuses."""

from typing import Any

import pytest
import torch
from msa_kernels import indexer_kl, select_blocks
from msa_kernels.block_sparse_attention.reference import kl_reference, selection_mask

S, M, G, D, DI, B, TOPK = 96, 2, 3, 16, 8, 8, 3


def problem(offset: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Two documents; queries from `offset` on."""
    torch.manual_seed(5)
    q_index, k_index = torch.randn(S, M, DI, dtype=dtype), torch.randn(S, DI, dtype=dtype)
    ids = select_blocks(q_index, k_index, torch.tensor([0, 40, S]), block_size=B, topk=TOPK)
    return {
        "q": torch.randn(S, M * G, D, dtype=dtype)[offset:],
        "k": torch.randn(S, M, D, dtype=dtype),
        "q_index": q_index[offset:],
        "k_index": k_index,
        "block_indices": ids[offset:],
    }


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize(("offset", "temperature", "weight"), [(0, 1.0, 1.0), (40, 1.5, 0.25)])
def test_is_the_definition(kernel: str, offset: int, temperature: float, weight: float) -> None:
    given = problem(offset)
    found = indexer_kl(
        **given, block_size=B, temperature=temperature, weight=weight, query_offset=offset, kernel=kernel
    )
    leaves = [given[name].clone().requires_grad_() for name in ("q_index", "k_index")]
    q = given["q"].view(-1, M, G, D)
    position = torch.arange(offset, S)
    mask = selection_mask(given["block_indices"], position, seq_len=S, block_size=B)
    scales = {"softmax_scale": D**-0.5 / temperature, "index_scale": DI**-0.5 / temperature}
    loss = weight * kl_reference(q, given["k"], *leaves, mask, **scales)
    gradients = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-11, atol=0)
    for got, want in zip((found.dq_index, found.dk_index), gradients, strict=True):
        assert float((got - want).abs().max()) < 1e-12
    assert float(found.loss) > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_index": torch.zeros(S, M + 1, DI)}, r"q_index.shape=\(96, 3, 8\): must be \[T, num_kv_heads"),
        ({"k_index": torch.zeros(S, DI + 1)}, r"k_index.shape=\(96, 9\): must be \[S, Di\] = \[96, 8\]"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"k": torch.zeros(S - 1, M, D)}, "S=95: must be a multiple of block_size=8"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    given = {**problem(dtype=torch.float32), "block_size": B, **change}
    with pytest.raises(ValueError, match=message):
        indexer_kl(**given)

"""Kernels are operators: fake tensors pass through their launches, and the scratch around them is counted."""

import pytest
import torch
from msa_kernels import select_blocks
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import BlockPool, KlTerm, SparseQueries
from msa_kernels.dispatch import has_triton
from msa_kernels.full_attention.op import attention_backward, attention_forward, backward_scratch

from msa_train.plan.trace.fake_device import FakeDevice

pytestmark = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
T, M, G, D, B, NB, K = 1024, 2, 4, 64, 128, 64, 8


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def test_selection() -> None:
    with FakeDevice(lambda _: "") as device:
        q_index, k_index = fake(T, M, D), fake(NB * B, D)
        before = device.current
        device.reset_peak()
        chosen = select_blocks(q_index, k_index, torch.tensor([0, NB * B]), block_size=B, topk=K)
        assert chosen.shape == (T, M, K)
        assert chosen.is_cuda
        held = device.current - before
        # candidates of the programs that share a tile of queries are dropped when they are merged
        assert held < device.peak.num_bytes - before
    assert "select_blocks_kernel" in dir(torch.ops.msa_kernels)


def test_scratch_of_full_attention() -> None:
    with FakeDevice(lambda _: "") as device:
        q, k, v = fake(T, M, G, D), fake(T, M, D), fake(T, M, D)
        out, lse = attention_forward(q, k, v, [0, T], [0, T], causal=True, softmax_scale=1.0, kernel="torch")
        device.reset_peak()
        before = device.current
        grads = attention_backward(
            torch.empty_like(out), q, k, v, out, lse, [0, T], [0, T],
            causal=True, softmax_scale=1.0, kernel="torch",
        )  # fmt: skip
        assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
        scratch = sum(backward_scratch(q, k, 1, "torch"))
        assert device.peak.num_bytes - before >= scratch + q.nbytes + 2 * k.nbytes


def test_attention_and_its_gradients() -> None:
    with FakeDevice(lambda _: "") as device:
        position = torch.arange(T, device="cuda")
        queries = SparseQueries(fake(T, M, G, D), position, 1.0, fake(T, M, D), fake(NB, B, D))
        pool = BlockPool(fake(M * NB, 2, B, D), torch.arange(NB, device="cuda").repeat(M))
        table = fake(T, M, K, dtype=torch.int64)
        device.reset_peak()
        before = device.current
        out = pool_forward(queries, pool, table)
        assert out.out.shape == (T, M, G, D)
        assert out.lse_index is not None
        # a partial output in bf16 and its log-sum-exp for each pair of a query and a slot
        assert device.peak.num_bytes - before > T * M * K * G * (D * 2 + 4)
        dout = torch.empty_like(out.out)
        delta = torch.empty_like(out.lse)
        grads = pool_backward(queries, pool, table, dout, delta, out.lse, KlTerm(out.lse_index, 1.0))
        assert grads.dkv.shape == (M * NB, 2, B, D)
        assert grads.dq_index is not None
        assert grads.dq_index.shape == (T, M, D)
    with pytest.raises(ValueError, match="runs on GPUs"):
        pool_forward(
            SparseQueries(torch.empty(1, 1, 1, 16), torch.arange(1), 1.0),
            BlockPool(torch.empty(1, 2, 16, 16), torch.zeros(1, dtype=torch.int64)),
            torch.zeros(1, 1, 1, dtype=torch.int64),
            kernel="triton",
        )

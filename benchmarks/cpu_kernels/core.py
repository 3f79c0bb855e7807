"""Run what is compared: the core of an MSA layer, and causal attention of torch over the same heads.

Shapes: S tokens, H query heads, M KV heads, D head dim, Di index head dim, topk slots.
"""

from dataclasses import dataclass, replace

import torch
from msa_kernels import select_blocks
from msa_kernels.block_sparse_attention.op import unpack_blocks, whole_pack
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import KlTerm
from torch import Tensor

from benchmarks.cpu_kernels.shape import CoreShape


@dataclass(slots=True)
class CoreInputs:
    """Hold the inputs of one layer's core, all fp32."""

    q: Tensor
    "[S, H, D]"
    k: Tensor
    "[S, M, D]"
    v: Tensor
    "[S, M, D]"
    dout: Tensor
    "[S, H, D], gradient of the output"
    q_index: Tensor
    "[S, M, Di]"
    k_index: Tensor
    "[S, Di]"


@dataclass(slots=True)
class CoreResult:
    """Hold output, selection, gradients and loss; gradients are shaped like their inputs."""

    out: Tensor
    "[S, H, D]"
    selected: Tensor
    "[S, M, topk] block ids"
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dq_index: Tensor
    dk_index: Tensor
    kl: Tensor
    "sum of the KL loss"


def make_inputs(shape: CoreShape, seq_len: int, seed: int = 0) -> CoreInputs:
    """Draw normal numbers: every earlier block is as likely to be selected, so that blocks lie far apart."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(seq_len, *size, generator=generator)

    return CoreInputs(
        q=normal(shape.num_heads, shape.head_dim),
        k=normal(shape.num_kv_heads, shape.head_dim),
        v=normal(shape.num_kv_heads, shape.head_dim),
        dout=normal(shape.num_heads, shape.head_dim),
        q_index=normal(shape.num_kv_heads, shape.index_dim),
        k_index=normal(shape.index_dim),
    )


def msa_core(shape: CoreShape, inputs: CoreInputs) -> CoreResult:
    """Run selection, block-sparse attention and the index branch's KL loss, forward and backward."""
    seq_len, num_kv_heads = len(inputs.q), shape.num_kv_heads
    starts = torch.tensor([0, seq_len])
    selected = select_blocks(
        inputs.q_index, inputs.k_index, starts, block_size=shape.block_size, topk=shape.topk
    )
    queries, pool, block_table = whole_pack(
        inputs.q, inputs.k, inputs.v, selected, shape.block_size, shape.head_dim**-0.5, 0, window=None
    )
    queries = replace(
        queries,
        q_index=inputs.q_index,
        k_index=inputs.k_index.view(-1, shape.block_size, shape.index_dim),
        index_scale=shape.index_dim**-0.5,
    )
    result = pool_forward(queries, pool, block_table)
    assert result.lse_index is not None, "index queries were given"
    dout = inputs.dout.view_as(result.out)
    delta = torch.einsum("tmgd,tmgd->tmg", dout, result.out)
    term = KlTerm(lse_index=result.lse_index, weight=1.0)
    grads = pool_backward(queries, pool, block_table, dout, delta, result.lse, term)
    assert grads.dq_index is not None, "a KL term was given"
    assert grads.dk_index is not None, "a KL term was given"
    assert grads.kl is not None, "a KL term was given"
    dk, dv = unpack_blocks(grads.dkv, num_kv_heads)
    return CoreResult(
        out=result.out.flatten(1, 2),
        selected=selected,
        dq=grads.dq.flatten(1, 2),
        dk=dk,
        dv=dv,
        dq_index=grads.dq_index,
        dk_index=grads.dk_index.view(num_kv_heads, seq_len, -1).sum(0),
        kl=grads.kl,
    )


def dense_attention(inputs: CoreInputs, num_heads: int) -> tuple[Tensor, ...]:
    """Run torch's causal attention of the first `num_heads` query heads: out, dq, dk, dv, as the inputs."""
    q, k, v = (
        x.transpose(0, 1).contiguous()[None].requires_grad_()
        for x in (inputs.q[:, :num_heads], inputs.k, inputs.v)
    )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out.backward(inputs.dout[:, :num_heads].transpose(0, 1)[None])
    assert q.grad is not None, "it requires one"
    assert k.grad is not None, "it requires one"
    assert v.grad is not None, "it requires one"
    return tuple(x[0].transpose(0, 1) for x in (out.detach(), q.grad, k.grad, v.grad))

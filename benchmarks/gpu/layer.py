"""Run the attention of an MSA layer as the trainer runs it on one rank: exchange, packing, casts, KL loss.

Shapes: S tokens, M KV groups, G query heads per group, D head dim, Di index head dim, K blocks per query.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.problem import IndexBranch, LayerSizes, Tensors
from msa_train.config import AttentionKernel, KvExchange
from msa_train.parallel.attention.cp_sparse import SparseAttentionArgs, cp_sparse_attention
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.sharding.shard_layout import ShardLayout

# A training step forms the KL loss's value where it is logged, by default in every step.
WITH_KL_VALUE = True


@dataclass(slots=True)
class LayerInputs:
    """Hold the leaves of one layer, and what its attention reads beside them."""

    q: Tensor
    """[S, M, G, D]."""
    k: Tensor
    """[S, M, D]; v alike."""
    v: Tensor
    q_index: Tensor
    """[S, M, Di]."""
    k_index: Tensor
    """[S, Di]."""
    dout: Tensor
    """Like q."""
    block_indices: Tensor
    """[S, M, K] int32."""
    position: Tensor
    """[S] int64."""
    block_size: int

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """List the tensors that get gradients."""
        return self.q, self.k, self.v, self.q_index, self.k_index


def make_inputs(
    tensors: Tensors, sizes: LayerSizes, index: IndexBranch, block_indices: Tensor
) -> LayerInputs:
    """Make the first KV groups, as many as block_indices [S, M, K] has."""
    S, M, _ = block_indices.shape
    heads = (S, M, sizes.heads_per_group, sizes.head_dim)
    return LayerInputs(
        q=tensors.normal(*heads).requires_grad_(),
        k=tensors.normal(S, M, sizes.head_dim).requires_grad_(),
        v=tensors.normal(S, M, sizes.head_dim).requires_grad_(),
        q_index=index.q[:, :M].contiguous().requires_grad_(),
        k_index=index.k.clone().requires_grad_(),
        dout=tensors.normal(*heads),
        block_indices=block_indices,
        position=torch.arange(S, device=tensors.device),
        block_size=sizes.block_size,
    )


def layer_forward(inputs: LayerInputs, kernel: str) -> Tensor:
    """Return the attention's output [S, M, G, D], as in a prefill."""
    with torch.no_grad():
        out, _ = cp_sparse_attention(inputs.q, inputs.k, inputs.v, None, None, _call(inputs, kernel, 0.0))
    return out


def layer_step(inputs: LayerInputs, kernel: str) -> tuple[Tensor, ...]:
    """Run forward and backward with the KL loss; return the output and the gradients of `leaves`."""
    out, _ = cp_sparse_attention(*inputs.leaves, _call(inputs, kernel, 1.0))
    return out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.dout)


def _call(inputs: LayerInputs, kernel: str, kl_weight: float) -> SparseAttentionArgs:
    S, Di = inputs.k_index.shape
    all_keys = inputs.k_index.detach().view(-1, inputs.block_size, Di)
    return SparseAttentionArgs(
        block_indices=inputs.block_indices,
        position=inputs.position,
        layout=ShardLayout(seq_len=S, block_size=inputs.block_size, cp_rank=0, cp_size=1),
        comm=KvComm(None, 0, 1, device=inputs.q.device),
        exchange=KvExchange.selected,
        softmax_scale=inputs.q.shape[-1] ** -0.5,
        index_scale=Di**-0.5,
        k_index=all_keys if kl_weight else None,
        kl_weight=kl_weight,
        on_kl=(lambda value: None) if WITH_KL_VALUE else None,
        kernel=AttentionKernel(kernel),
    )

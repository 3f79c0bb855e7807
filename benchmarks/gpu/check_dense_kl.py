"""Check the warm-up's KL loss over all causal tokens: its value and its gradients."""

from collections.abc import Callable

import torch
from msa_kernels.block_sparse_attention.reference import kl_reference
from msa_kernels.dense_kl.op import dense_kl_part, lse_part
from torch import Tensor

from benchmarks.gpu.comparison import Check, against_plain
from benchmarks.gpu.problem import LayerSizes, Tensors

NAMES = ("dq_index", "dk_index", "kl")


def dense_kl_cases(
    tensors: Tensors, sizes: LayerSizes, kernel: str, *, num_tokens: int
) -> dict[str, Callable[[], list[Check]]]:
    """Return the one case, over a document of num_tokens."""
    return {"dense kl": lambda: _dense_kl(tensors, sizes, kernel, num_tokens)}


def _dense_kl(tensors: Tensors, sizes: LayerSizes, kernel: str, T: int) -> list[Check]:
    M, G, D, Di = sizes.num_kv_heads, sizes.heads_per_group, sizes.head_dim, sizes.index_head_dim
    q, k = tensors.normal(T, M, G, D), tensors.normal(T, M, D)
    q_index, k_index = tensors.normal(T, M, Di), tensors.normal(T, Di)
    scales = {"softmax_scale": D**-0.5, "index_scale": Di**-0.5}
    heads, keys, index = q.permute(1, 2, 0, 3), k.transpose(0, 1), q_index.transpose(0, 1)
    lse = lse_part(heads, keys, causal=True, softmax_scale=scales["softmax_scale"], kernel=kernel)
    lse_index = lse_part(
        index[:, None], k_index[None], causal=True, softmax_scale=scales["index_scale"], kernel=kernel
    )[:, 0]
    grads = dense_kl_part(heads, keys, lse, index, k_index, lse_index, causal=True, kernel=kernel, **scales)
    assert grads.kl is not None, "the value is asked for"
    mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[:, None].expand(-1, M, -1)

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q_index, k_index)]
        kl = kl_reference(q.to(dtype), k.to(dtype), *leaves, mask, **scales)
        return *torch.autograd.grad(kl, leaves), kl.detach().view(1)

    ours = grads.dq_index.transpose(0, 1), grads.dk_index, grads.kl.view(1)
    both = zip(NAMES, ours, plain(q.dtype), plain(torch.float64), strict=True)
    return [against_plain(f"dense kl: {name}", a, b, c) for name, a, b, c in both]

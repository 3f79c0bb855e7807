"""Attend with packed queries to packed keys, one part of full attention, with the log-sum-exp to merge parts.

The forward of each part returns its own (out, lse). The backward takes the *merged* out and lse and gives
this part's exact share of dq and its dk, dv: with p = exp(s - lse) and delta = rowsum(dout * out), the
softmax gradient needs nothing else of the other parts. block_sparse_attention/tiled_backward.py derives it.

No tensor of query heads x keys is made in the forward pass. In the backward pass some libraries hold dk and
dv once per query head until they add them up: `most_keys` says how many keys a call may have for that to stay
within KEY_BYTES.

Shapes: M KV heads, G query heads of each, Q queries, K keys, D head dim, N pairs of spans.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from msa_kernels.full_attention.choice import Choice, choose, takes_flash
from msa_kernels.full_attention.tiled import TILE

KEY_BYTES = 2**29
"bytes that a kernel may hold of dk and dv per query head"
_MODULES = {
    "flash3": "msa_kernels.full_attention.varlen",
    "flash2": "msa_kernels.full_attention.varlen",
    "cudnn": "msa_kernels.full_attention.cudnn",
    "torch": "msa_kernels.full_attention.varlen",
    "torch_cpu": "msa_kernels.full_attention.torch_cpu",
    "tiled": "msa_kernels.full_attention.tiled",
}


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    *,
    causal: bool,
    softmax_scale: float,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend with each span of queries to its span of keys.

    Args:
        q: [Q, M, G, D]; fp64, fp32, fp16 or bf16.
        k, v: [K, M, D], likewise, channels contiguous; each KV head's keys serve its G query heads.
        cu_q, cu_k: [N + 1] first rows of the spans, with Q and K at the end; no span is empty.
        causal: the last query of a span sees all its keys, the one before it all but the last, and so on; a
            span has at least as many keys as queries, and as many where `takes_offset` says no. Else every
            query sees all keys of its span.
        softmax_scale: factor of the scores.
        kernel: see `choice.choose`.

    Returns:
        out [Q, M, G, D] in q's dtype, lse [M, G, Q] natural log, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: where `kernel` cannot run.

    Example: cu_q [0, 2], cu_k [0, 5], causal: query 0 sees keys 0..4, query 1 keys 0..5.
    """
    return torch.ops.msa.full_attention_forward(
        q, k, v, list(cu_q), list(cu_k), causal, softmax_scale, _choose(kernel, q).name
    )


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    *,
    causal: bool,
    softmax_scale: float,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Form gradients of one part, given the merged `out` and `lse` of all parts.

    Shapes as in `attention_forward`; dout like out. Returns dq [Q, M, G, D], dk, dv [K, M, D] in q's dtype:
    G query heads of a KV head are added up already.
    """
    return torch.ops.msa.full_attention_backward(
        dout, q, k, v, out, lse, list(cu_q), list(cu_k), causal, softmax_scale, _choose(kernel, q).name
    )


def takes_offset(q: Tensor, kernel: str = "auto") -> bool:
    """Tell whether causal spans may have more keys than queries with this kernel."""
    return module_of(_choose(kernel, q).name, q).TAKES_OFFSET


def most_keys(q: Tensor) -> int:
    """Return how many keys a backward call should have at most, a multiple of 128.

    Example: 64 query heads of 128 channels in bf16 -> 16,384: dk and dv per query head take 512 MiB.
    """
    per_key = 2 * q.shape[1] * q.shape[2] * q.shape[3] * q.element_size()
    return max(KEY_BYTES // per_key // 128 * 128, 128)


def merge_parts(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the results over two disjoint sets of keys to that over their union.

    out [..., D], lse [...] each. lse = log(e^lse1 + e^lse2), out = e^(lse1-lse) out1 + e^(lse2-lse) out2, in
    the wider dtype of the two outputs. A part that saw no key has lse -inf and out 0 and changes nothing.

    Example: outputs 1 and 5 with lse log 3 and log 1 give lse log 4 and (3 * 1 + 1 * 5) / 4 = 2.
    """
    total = torch.logaddexp(lse, other_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    weight, other = (lse - safe).exp().unsqueeze(-1), (other_lse - safe).exp().unsqueeze(-1)
    return (out * weight + other_out * other).to(torch.promote_types(out.dtype, other_out.dtype)), total


@torch.library.custom_op("msa::full_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    causal: bool,
    softmax_scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    out, lse = module_of(kernel, q).forward(q, k, v, cu_q, cu_k, causal, softmax_scale, kernel)
    return out.contiguous(), lse.view(q.shape[1], q.shape[2], q.shape[0])


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    causal: bool,
    softmax_scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    # the kernels' own scratch in a forward pass is some KiB per block of queries that is at work
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[2], q.shape[0], dtype=dtype)


@torch.library.custom_op("msa::full_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    causal: bool,
    softmax_scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = lse.reshape(-1, q.shape[0]).contiguous()
    run = module_of(kernel, q).backward
    dq, dk, dv = run(dout, q, k, v, out, lse, cu_q, cu_k, causal, softmax_scale, kernel)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    causal: bool,
    softmax_scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # A tracker of memory sees what the kernels hold meanwhile as tensors that live until this returns.
    scratch = [q.new_empty(n, dtype=torch.uint8) for n in backward_scratch(q, k, len(cu_q) - 1, kernel)]
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    del scratch
    return grads


def backward_scratch(q: Tensor, k: Tensor, num_pairs: int, kernel: str) -> list[int]:
    """List the bytes of what a kernel holds in the backward pass beside its arguments and results.

    By reading the libraries' sources, not measured: FA2 and torch's copy of it hold dq in fp32 with 128 rows
    more per pair, and dk, dv per query head; cuDNN the same without the rows; FA3 all of dq, dk, dv in fp32.

    Args:
        q, k: as in `attention_backward`. num_pairs: N. kernel: of a `Choice`.

    Example: 16,384 queries and keys, 4 x 16 heads of 128 channels, bf16, flash2 -> 516 MiB, 256 MiB, 256 MiB
    and 4 MiB.
    """
    (num_queries, num_kv_heads, group, dim), num_keys = q.shape, k.shape[0]
    heads = num_kv_heads * group
    if q.device.type == "cpu":
        return []
    if kernel == "torch" and not takes_flash(q.dtype, dim):
        scores = heads * min(num_queries, TILE) * min(num_keys, TILE) * q.element_size()
        return [scores, scores, scores]
    rows = num_queries + 128 * num_pairs
    wide = [rows * heads * dim * 4, rows * heads * 4]
    if kernel == "flash3":
        narrow = (num_keys + 128 * num_pairs) * num_kv_heads * dim * 4
        return [*wide, narrow, narrow]
    per_head = num_keys * heads * dim * q.element_size()
    return [*wide, per_head, per_head]


def _choose(kernel: str, q: Tensor) -> Choice:
    return choose(kernel, q.device, q.dtype, q.shape[-1], torch.are_deterministic_algorithms_enabled())


def module_of(kernel: str, q: Tensor) -> ModuleType:
    """Return the module with `forward`, `backward` and `TAKES_OFFSET` that runs a kernel for such tensors."""
    if kernel == "torch":
        if q.device.type == "cpu":
            kernel = "torch_cpu"
        elif not takes_flash(q.dtype, q.shape[-1]):
            kernel = "tiled"
    return importlib.import_module(_MODULES[kernel])

"""Form one part of the dense KL loss: choice of the implementation, and the tiled one in torch.

No query-by-key matrix is ever held. As in `full_attention`, keys come in parts (own tokens, earlier ranks'
tokens) and every part's result is exact given the log-sum-exps over all parts; gradients and values of parts
add up.

Shapes: M KV heads, G query heads of each, Q queries, K keys, D head dim, Di index head dim.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from msa_kernels.dense_kl import configs
from msa_kernels.dense_kl.grads import DenseKlGrads
from msa_kernels.dispatch import choose_kernel, dtypes_not_in_triton
from msa_kernels.tiles import padded

_MODULES = {"triton": "msa_kernels.dense_kl.triton.launch", "reference": "msa_kernels.dense_kl.reference"}
_QUERY_TILE = 256
# Elements of one teacher score tile: 8 MiB in fp32.
_TILE_ELEMENTS = 2**21


def lse_part(q: Tensor, k: Tensor, *, causal: bool, softmax_scale: float, kernel: str = "auto") -> Tensor:
    """Take the log-sum-exp of scaled scores.

    Args:
        q: [M, G, Q, D]; k: [M, K, D], or [1, K, D] for keys that all KV heads share.
        causal: query i sees keys 0..i (needs Q == K); otherwise every query sees every key.
        softmax_scale: factor of the scores.
        kernel: "triton" (GPUs; fp32, fp16, bf16), "cpu" (torch, any device), "reference", or "auto".

    Returns:
        [M, G, Q] natural log, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: on another kernel, and where "triton" cannot serve the call.
    """
    chosen = _implementation(kernel, q, k)
    if chosen is not None:
        return chosen.lse_part(q, k, causal=causal, softmax_scale=softmax_scale)
    dtype = _compute_dtype(q)
    result = torch.full(q.shape[:-1], float("-inf"), dtype=dtype, device=q.device)
    for rows, keys in _tiles(q.shape[2], k.shape[1], q.shape[0] * q.shape[1], causal):
        scores = _scores(q, k, rows, keys, dtype, softmax_scale)
        if causal:
            scores.masked_fill_(_future(rows, keys, q.device), float("-inf"))
        # tiles are disjoint sets of keys: their log-sum-exps merge
        result[:, :, rows] = torch.logaddexp(result[:, :, rows], scores.logsumexp(-1))
    return result


def dense_kl_part(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    lse_index: Tensor,
    *,
    causal: bool,
    softmax_scale: float,
    index_scale: float,
    with_value: bool = True,
    kernel: str = "auto",
) -> DenseKlGrads:
    """Form gradients and value of the sum over queries and KV heads of KL(teacher || student).

    Teacher: mean over the query heads of a KV head of softmax(q k), detached. Student: softmax(q_index
    k_index). With ds = student - teacher the gradients are index_scale * ds k_index and its transpose.

    Args:
        q: [M, G, Q, D]; k: [M, K, D].
        lse: [M, G, Q] over all parts, at `softmax_scale`.
        q_index: [M, Q, Di]; k_index: [K, Di], shared by the KV heads.
        lse_index: [M, Q] over all parts, at `index_scale`.
        causal: query i sees keys 0..i (needs Q == K); otherwise every query sees every key.
        softmax_scale, index_scale: factors of the two scores, temperature included.
        with_value: the value too, and not the gradients alone.
        kernel: as in `lse_part`.

    Raises:
        ValueError: as in `lse_part`.

    Source: arXiv 2606.13392 equations 9 and 10, over all causal tokens as in its warm-up (section 4).
    """
    chosen = _implementation(kernel, q, k, q_index, k_index)
    if chosen is not None:
        return chosen.dense_kl_part(
            q, k, lse, q_index, k_index, lse_index,
            causal=causal, softmax_scale=softmax_scale, index_scale=index_scale, with_value=with_value,
        )  # fmt: skip
    dtype = _compute_dtype(q)
    grads = DenseKlGrads(
        dq_index=torch.zeros(q_index.shape, dtype=dtype, device=q.device),
        dk_index=torch.zeros(k_index.shape, dtype=dtype, device=q.device),
        kl=torch.zeros((), dtype=torch.float64, device=q.device) if with_value else None,
    )
    for rows, keys in _tiles(q.shape[2], k.shape[1], q.shape[0] * q.shape[1], causal):
        teacher = _scores(q, k, rows, keys, dtype, softmax_scale)
        # mean over the query heads of softmax, normalised by the log-sum-exp over all parts
        teacher = teacher.sub_(lse[:, :, rows, None]).exp_().mean(1)
        queries, index_keys = q_index[:, rows].to(dtype), k_index[keys].to(dtype)
        log_student = (queries @ index_keys.T).mul_(index_scale).sub_(lse_index[:, rows, None])
        if causal:
            future = _future(rows, keys, q.device)
            teacher.masked_fill_(future, 0.0)
            # teacher 0 times a finite logarithm is 0; with -inf it would not be a number
            log_student.masked_fill_(future, 0.0)
            student = log_student.exp().masked_fill_(future, 0.0)
        else:
            student = log_student.exp()
        if grads.kl is not None:
            grads.kl += (torch.xlogy(teacher, teacher) - teacher * log_student).sum(dtype=torch.float64)
        # d KL / d logit = student - teacher, as the teacher sums to 1 over all parts: tiled_backward.py
        # derives it
        ds = student.sub_(teacher).mul_(index_scale)
        grads.dq_index[:, rows] += ds @ index_keys
        grads.dk_index[keys] += ds.flatten(0, 1).T @ queries.flatten(0, 1)
    return grads


def _implementation(kernel: str, *tensors: Tensor) -> Any:
    """Return the module with both functions, or None for the tiled ones here."""
    chosen = choose_kernel(kernel, tensors[0].device, _unsupported(*tensors))
    return None if chosen == "cpu" else importlib.import_module(_MODULES[chosen])


def _unsupported(*tensors: Tensor) -> str | None:
    """Return why there are no Triton kernels for these tensors; None where there are."""
    if dtypes := dtypes_not_in_triton(tensors):
        return f"dtype={dtypes}: all tensors must be bfloat16, float16 or float32"
    dim = max(tensor.shape[-1] for tensor in tensors)
    if configs.pick(configs.DIFFERENCE, padded(dim), tensors[0].element_size()) is None:
        return f"head_dim={dim}: must be at most 256"
    return None


def _tiles(num_queries: int, num_keys: int, num_heads: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yield tiles of the score matrix that hold at least one visible key.

    Example (600 queries and keys, causal, tiles of 256 x 512): queries 0..256 with keys 0..256, 256..512 with
    0..512, and 512..600 with 0..512 and 512..600.
    """
    width = max(64, _TILE_ELEMENTS // (num_heads * _QUERY_TILE))
    for begin in range(0, num_queries, _QUERY_TILE):
        end = min(begin + _QUERY_TILE, num_queries)
        visible = min(end, num_keys) if causal else num_keys
        for first in range(0, visible, width):
            yield slice(begin, end), slice(first, min(first + width, visible))


def _scores(q: Tensor, k: Tensor, rows: slice, keys: slice, dtype: torch.dtype, scale: float) -> Tensor:
    """Form scaled scores of a tile [M, G, rows, keys]."""
    queries = q[:, :, rows].to(dtype)
    flat = queries.flatten(1, 2) @ k[:, keys].to(dtype).transpose(1, 2)
    return flat.view(*queries.shape[:3], -1).mul_(scale)


def _future(rows: slice, keys: slice, device: torch.device) -> Tensor:
    """Mark keys that come after the query: [rows, keys] bool."""
    position = torch.arange(rows.start, rows.stop, device=device)
    return torch.arange(keys.start, keys.stop, device=device) > position[:, None]


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of scores and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

"""Define one part of the dense KL loss plainly, with whole score matrices. For tests, any device.

Shapes: M KV heads, G query heads of each, Q queries, K keys, D head dim, Di index head dim.
"""

import torch
from torch import Tensor

from msa_kernels.dense_kl.grads import DenseKlGrads


def lse_part(q: Tensor, k: Tensor, *, causal: bool, softmax_scale: float) -> Tensor:
    """Follow `op.lse_part`; memory grows with M * G * Q * K."""
    return _scores(q, k, causal, softmax_scale).logsumexp(-1)


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
    with_value: bool,
) -> DenseKlGrads:
    """Follow `op.dense_kl_part`; memory as above."""
    teacher = (_scores(q, k, causal, softmax_scale) - lse[..., None]).exp().mean(1)
    log_student = _scores(q_index[:, None], k_index[None], causal, index_scale)[:, 0] - lse_index[..., None]
    ds = (log_student.exp() - teacher) * index_scale
    # 0 * -inf of hidden keys would not be a number
    cross = torch.where(teacher > 0, teacher * log_student, 0.0)
    return DenseKlGrads(
        dq_index=torch.einsum("mqk,kd->mqd", ds, k_index.to(ds.dtype)),
        dk_index=torch.einsum("mqk,mqd->kd", ds, q_index.to(ds.dtype)),
        kl=(torch.xlogy(teacher, teacher) - cross).sum(dtype=torch.float64) if with_value else None,
    )


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """Form scores: q [M, G, Q, D], k [M or 1, K, D] -> [M, G, Q, K]; -inf for keys of the future."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(dtype) @ k.to(dtype).mT[:, None] * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(future, float("-inf"))
    return scores

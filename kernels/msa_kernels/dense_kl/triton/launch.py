"""Launch the Triton kernels of the dense KL loss: torch tensors in, torch tensors out. Imports Triton.

Shapes: M KV heads, G query heads of each, Q queries, K keys, D head dim, Di index head dim.
"""

import torch
import triton
from torch import Tensor

from msa_kernels.dense_kl import configs
from msa_kernels.dense_kl.configs import DenseConfig
from msa_kernels.dense_kl.grads import DenseKlGrads
from msa_kernels.dense_kl.triton import kernel
from msa_kernels.operators import Launched
from msa_kernels.tiles import padded

# Differences of student and teacher that exist at a time: in 16 bits, 256 queries of 4 KV heads and 128K keys
DIFFERENCE_BYTES = 2**28
# Programs that fill a large device: two on each of 132 multiprocessors
_WANTED_PROGRAMS = 264


def lse_part(q: Tensor, k: Tensor, *, causal: bool, softmax_scale: float) -> Tensor:
    """Run `op.lse_part` on a GPU; q and k of one dtype, fp32, fp16 or bf16."""
    M, G, Q, D = q.shape
    q, k = _last_dim_dense(q), _last_dim_dense(k)
    if Q == 0 or k.shape[1] == 0:
        return torch.full((M, G, Q), float("-inf"), device=q.device)
    lse = torch.empty(M, G, Q, device=q.device)
    config = _config(configs.LSE, D, q)
    Launched(kernel.lse_kernel)[(triton.cdiv(Q, config.rows), M * G)](
        q,
        k,
        lse,
        Q,
        k.shape[1],
        softmax_scale * kernel.LOG2E.value,
        *q.stride()[:3],
        0 if k.shape[0] == 1 else k.stride(0),
        k.stride(1),
        G=G,
        D=D,
        DP=padded(D),
        ROWS=config.rows,
        KEYS=config.keys,
        CAUSAL=causal,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return lse


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
) -> DenseKlGrads:
    """Run `op.dense_kl_part` on a GPU; q, k, q_index and k_index of one dtype, fp32, fp16 or bf16."""
    M, G, Q, D = q.shape
    K, Di = k_index.shape
    q, k, q_index, k_index = (_last_dim_dense(x) for x in (q, k, q_index, k_index))
    grads = DenseKlGrads(
        dq_index=torch.zeros(M, Q, Di, device=q.device),
        dk_index=torch.zeros(K, Di, device=q.device),
        kl=torch.zeros((), dtype=torch.float64, device=q.device) if with_value else None,
    )
    if Q == 0 or K == 0:
        return grads
    config = _config(configs.DIFFERENCE, max(D, Di), q)
    constants = {
        "DI": Di,
        "DIP": padded(Di),
        "ROWS": config.rows,
        "KEYS": config.keys,
        "CAUSAL": causal,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }
    lse, lse_index = lse.float().contiguous(), lse_index.float().contiguous()
    # queries at a time: as many tiles as the buffer of differences holds
    stride = triton.cdiv(K, config.keys) * config.keys
    tiles = max(1, DIFFERENCE_BYTES // (M * stride * q.element_size() * config.rows))
    step = min(tiles * config.rows, Q)
    difference = k_index.new_empty(M * step * stride)
    for begin in range(0, Q, step):
        stop = min(begin + step, Q)
        # of a causal part, keys after the portion's last query are not looked at
        seen = min(K, stop) if causal else K
        row_tiles, key_tiles = triton.cdiv(stop - begin, config.rows), triton.cdiv(seen, config.keys)
        # without a value: looked at by nobody
        kl_part = lse.new_empty(key_tiles, M, stop - begin) if with_value else lse
        Launched(kernel.difference_kernel)[(key_tiles, row_tiles, M)](
            q,
            k,
            lse,
            q_index,
            k_index,
            lse_index,
            difference,
            kl_part,
            Q,
            K,
            begin,
            stop,
            stride,
            softmax_scale * kernel.LOG2E.value,
            index_scale * kernel.LOG2E.value,
            *q.stride()[:3],
            *k.stride()[:2],
            *q_index.stride()[:2],
            k_index.stride(0),
            G=G,
            D=D,
            DP=padded(D),
            WITH_VALUE=with_value,
            **constants,
        )
        if grads.kl is not None:
            grads.kl += kl_part.sum(dtype=torch.float64)
        # few tiles of queries: the keys are shared out, and the shares of dq_index added up below in order
        split_tiles = triton.cdiv(key_tiles, max(1, _WANTED_PROGRAMS // (row_tiles * M)))
        splits = triton.cdiv(key_tiles, split_tiles)
        dq_part = lse.new_empty(splits, M, stop - begin, Di)
        Launched(kernel.query_gradient_kernel)[(row_tiles, splits, M)](
            difference,
            k_index,
            dq_part,
            K,
            begin,
            stop,
            stride,
            split_tiles * config.keys,
            index_scale,
            k_index.stride(0),
            **constants | {"STAGES": min(config.num_stages, configs.QUERY_GRADIENT_STAGES)},
        )
        # shares of the keys, added in one order
        torch.sum(dq_part, 0, out=grads.dq_index[:, begin:stop])
        Launched(kernel.key_gradient_kernel)[(key_tiles,)](
            difference,
            q_index,
            grads.dk_index,
            K,
            begin,
            stop,
            stride,
            index_scale,
            *q_index.stride()[:2],
            M=M,
            **constants,
        )
    return grads


def _config(table: tuple[DenseConfig, ...], dim: int, q: Tensor) -> DenseConfig:
    """Pick tile sizes, which `op._unsupported` has found to exist."""
    config = configs.pick(table, padded(dim), q.element_size())
    assert config is not None, "`op._unsupported` has found one"
    return config


def _last_dim_dense(rows: Tensor) -> Tensor:
    """Return the same with stride 1 in the last dim, the only stride that kernels take for granted."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()

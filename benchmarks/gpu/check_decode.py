"""Check decoding: the newest token of two sequences against a flat cache."""

from collections.abc import Callable

import torch
from msa_kernels import decode_attention, quantize_index_keys
from msa_kernels.block_sparse_attention.reference import attention_reference, selection_mask
from msa_kernels.decode.cache import DecodeCache
from torch import Tensor

from benchmarks.gpu.comparison import Check, against_plain, selection_check
from benchmarks.gpu.problem import LayerSizes, Tensors


def decode_cases(
    tensors: Tensors, sizes: LayerSizes, kernel: str, *, seq_len: int
) -> dict[str, Callable[[], list[Check]]]:
    """Return the cases by name."""
    return {
        "decode": lambda: _decode(tensors, sizes, seq_len, kernel),
        "decode, fp8 index keys": lambda: [_decode_fp8(tensors, sizes, seq_len, kernel)],
    }


def _decode(tensors: Tensors, sizes: LayerSizes, seq_len: int, kernel: str) -> list[Check]:
    """Decode, and return the output; both runs take the blocks that the kernel chose."""
    M, G, D = sizes.num_kv_heads, sizes.heads_per_group, sizes.head_dim
    normal = tensors.normal
    k, v = (normal(2, seq_len, M, D) for _ in range(2))
    cache = DecodeCache(k=k, v=v, k_index=normal(2, seq_len, sizes.index_head_dim))
    q, q_index = normal(2, M * G, D), normal(2, M, sizes.index_head_dim)
    lengths = {"whole cache": seq_len, "a part of the cache": seq_len // 2 - 3}
    lens = torch.tensor(list(lengths.values()), dtype=torch.int32, device=q.device)
    out, _, ids = decode_attention(
        q, q_index, cache, lens, block_size=sizes.block_size, topk=sizes.topk, kernel=kernel
    )
    found = []
    for b, (name, length) in enumerate(lengths.items()):
        position = torch.tensor([length - 1])
        mask = selection_mask(ids[b : b + 1].cpu(), position, seq_len=seq_len, block_size=sizes.block_size)
        mask = mask.to(q.device)

        def plain(dtype: torch.dtype, b: int = b, mask: Tensor = mask) -> Tensor:
            rows = (x[b].to(dtype) for x in (q.view(2, 1, M, G, D), k, v))
            return attention_reference(*rows, mask, softmax_scale=D**-0.5)[0]

        ours = out[b].view(1, M, G, D)
        found.append(against_plain(f"decode: {name}", ours, plain(q.dtype), plain(torch.float64)))
    return found


def _decode_fp8(tensors: Tensors, sizes: LayerSizes, seq_len: int, kernel: str) -> Check:
    """Check the selection by fp64 scores of the very same fp8 keys."""
    M, G, D, B = sizes.num_kv_heads, sizes.heads_per_group, sizes.head_dim, sizes.block_size
    k = tensors.normal(1, seq_len, M, D)
    keys, scale = quantize_index_keys(tensors.normal(1, seq_len, sizes.index_head_dim))
    q, q_index = tensors.normal(1, M * G, D), tensors.normal(1, M, sizes.index_head_dim)
    ids = decode_attention(
        q, q_index, DecodeCache(k, k, keys, k_index_scale=scale),
        torch.tensor([seq_len], dtype=torch.int32, device=q.device),
        block_size=B, topk=sizes.topk, kernel=kernel,
    )[2]  # fmt: skip
    scores = q_index[0].double() @ (keys[0].double() * scale[0, :, None].double()).T
    scores = scores.unflatten(-1, (-1, B)).amax(-1)
    first = torch.zeros(1, dtype=torch.int64, device=q.device)
    return selection_check(
        "decode, fp8 index keys", scores[None], ids, first, first + seq_len // B - 1, sizes.topk
    )

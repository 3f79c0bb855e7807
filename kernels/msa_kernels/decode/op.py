"""Decode one new token per sequence: score cached index keys, take the best blocks, attend to their tokens.

Shapes: B sequences, H query heads, M KV heads, D head dim, Di index head dim, S tokens of a sequence.
"""

import torch
from torch import Tensor

from msa_kernels.arguments import check_floating, check_integer, check_same_device, check_topk
from msa_kernels.decode.cache import DecodeCache
from msa_kernels.decode.configs import MAX_FLOAT32_BLOCK_ELEMENTS
from msa_kernels.decode.reference import decode_attention_reference
from msa_kernels.dispatch import choose_kernel
from msa_kernels.select_blocks.op import topk_lowest_id

# Tokens whose index keys are converted and scored at a time: a few MiB
_TOKENS_PER_TILE = 2**14


@torch.no_grad()
def decode_attention(
    q: Tensor,
    q_index: Tensor,
    cache: DecodeCache,
    seq_lens: Tensor,
    *,
    block_size: int,
    topk: int,
    local_blocks: int = 1,
    softmax_scale: float | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with the newest token of each sequence to the cached tokens of its selected blocks.

    A sequence is one document. The selection is that of `select_blocks` for its last token, the softmax that
    of `block_sparse_attention`.

    Args:
        q: [B, H, D] queries of the newest tokens, any float dtype.
        q_index: [B, M, Di] their index queries.
        cache: keys, values, index keys of all tokens, the newest included; M divides H. Index keys may be
            kept in fp8 (`quantize_index_keys`), which may change the selection: scores are products of these
            keys and the index queries as given.
        seq_lens: [B] int, tokens per sequence, the newest included; 0 for a sequence that is not there. At
            most the cache's capacity.
        block_size: tokens per block; divides the page size of a paged cache.
        topk: blocks per sequence and KV head.
        local_blocks: forced blocks that end at the newest token's, at most topk.
        softmax_scale: factor of the scores, default D ** -0.5.
        kernel: "triton" (GPUs; fp32, fp16, bf16), "cpu" (torch, any device), "reference", or "auto".

    Returns:
        out [B, H, D] in q's dtype, lse [B, H] natural log, fp32 (fp64 for fp64 inputs), and block_indices
        [B, M, topk] int32, ascending, -1 on the right. A sequence of length 0 gets 0, -inf and -1.

    Raises:
        ValueError: on shapes, dtypes, devices or sizes that do not fit, and on lengths and pages out of range
            (tensors on a device: only where MSA_KERNELS_CHECK=1, since looking means waiting).

    Source: arXiv 2606.13392 sections 2 and 3.
    """
    _check(q, q_index, cache, seq_lens, block_size, topk, local_blocks)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    chosen = choose_kernel(kernel, q.device, _not_in_triton(q, q_index, cache, block_size, topk))
    if chosen == "triton":
        # triton is not installed everywhere
        from msa_kernels.decode.triton.launch import decode_attention_triton as implementation
    else:
        implementation = decode_attention_reference if chosen == "reference" else _decode_torch
    return implementation(
        q,
        q_index,
        cache,
        seq_lens,
        block_size=block_size,
        topk=topk,
        local_blocks=local_blocks,
        softmax_scale=scale,
    )


def _decode_torch(
    q: Tensor,
    q_index: Tensor,
    cache: DecodeCache,
    seq_lens: Tensor,
    *,
    block_size: int,
    topk: int,
    local_blocks: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the contract of `decode_attention` in torch, one sequence after the other; waits for lengths."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_kv_heads = q_index.shape[1]
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=dtype)
    block_indices = torch.full((*q_index.shape[:2], topk), -1, dtype=torch.int32, device=q.device)
    for b, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        pages = cache.pages(b, length)
        scores = _block_scores(q_index[b].to(dtype), cache, pages, length, block_size)
        # forced blocks are the last ones, since the query is the last token
        scores[:, max(0, scores.shape[1] - local_blocks) :] = float("inf")
        blocks = topk_lowest_id(scores, topk)
        block_indices[b, :, : blocks.shape[1]] = blocks.to(torch.int32)
        # [M, topk, block_size]; block 3 of 128 tokens has tokens 384 to 511
        token = blocks[:, :, None] * block_size + torch.arange(block_size, device=q.device)
        # an empty slot has block -1
        seen = ((token >= 0) & (token < length) & (blocks >= 0)[:, :, None]).flatten(1)
        token = token.clamp(0, length - 1).flatten(1)
        page = torch.tensor(pages, device=q.device)[token // cache.page_size]
        kv_head = torch.arange(num_kv_heads, device=q.device)[:, None]
        k, v = (rows[page, token % cache.page_size, kv_head].to(dtype) for rows in (cache.k, cache.v))
        queries = q[b].view(num_kv_heads, -1, q.shape[-1]).to(dtype)
        logits = (queries @ k.mT * softmax_scale).masked_fill_(~seen[:, None], float("-inf"))
        lse[b] = logits.logsumexp(-1).flatten()
        out[b] = (logits.softmax(-1) @ v).flatten(0, 1).to(q.dtype)
    return out, lse, block_indices


def _block_scores(
    q_index: Tensor, cache: DecodeCache, pages: list[int], length: int, block_size: int
) -> Tensor:
    """Take the largest score of each block of a sequence, whole or not: q_index [M, Di] -> [M, NB]."""
    num_blocks = -(-length // block_size)
    scores = q_index.new_empty(num_blocks, len(q_index))
    tile = max(1, _TOKENS_PER_TILE // block_size) * block_size
    for number, page in enumerate(pages):
        first = number * cache.page_size
        held = min(cache.page_size, length - first)
        for begin in range(0, held, tile):
            keys = cache.index_keys(page, slice(begin, min(begin + tile, held)), q_index.dtype)
            products = keys @ q_index.T
            # the last block of a sequence may be short: what is missing of it scores -inf
            missing = -len(products) % block_size
            if missing:
                products = torch.nn.functional.pad(products, (0, 0, 0, missing), value=float("-inf"))
            best = products.view(-1, block_size, len(q_index)).amax(1)
            block = (first + begin) // block_size
            scores[block : block + len(best)] = best
    return scores.T.contiguous()


def _not_in_triton(q: Tensor, q_index: Tensor, cache: DecodeCache, block_size: int, topk: int) -> str | None:
    """Return why there is no Triton kernel for these arguments, None if there is one."""
    # one dtype for both operands of a product; fp8 keys are converted to that of the queries
    dtypes = {tensor.dtype for tensor in (q, q_index, cache.k)}
    if not cache.has_fp8_keys:
        dtypes.add(cache.k_index.dtype)
    if len(dtypes) > 1 or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtypes={sorted(map(str, dtypes))}: must be one of fp32, fp16, bf16"
    if max(q.shape[-1], q_index.shape[-1]) > 256:
        return f"D={q.shape[-1]}, Di={q_index.shape[-1]}: must be at most 256"
    if block_size > 256:
        return f"block_size={block_size}: must be at most 256"
    if q.dtype == torch.float32 and block_size * q_index.shape[-1] > MAX_FLOAT32_BLOCK_ELEMENTS:
        return (
            f"block_size={block_size}, Di={q_index.shape[-1]}: their product must be at most "
            f"{MAX_FLOAT32_BLOCK_ELEMENTS} in fp32"
        )
    return None if topk <= 64 else f"topk={topk}: must be at most 64"


def _check(
    q: Tensor,
    q_index: Tensor,
    cache: DecodeCache,
    seq_lens: Tensor,
    block_size: int,
    topk: int,
    local_blocks: int,
) -> None:
    """Raise ValueError on shapes, dtypes, devices, sizes, lengths and pages that do not fit."""
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: must be at least 1")
    cache.check(block_size)
    _, _, num_kv_heads, dim = cache.k.shape
    batch = cache.num_sequences
    if q.dim() != 3 or q.shape[0] != batch or q.shape[2] != dim:
        raise ValueError(f"q.shape={tuple(q.shape)}: must be [B, H, D] = [{batch}, H, {dim}], as the cache")
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"H={q.shape[1]}: must be a multiple of the cache's M={num_kv_heads}")
    if q_index.shape != (batch, num_kv_heads, cache.k_index.shape[-1]):
        raise ValueError(
            f"q_index.shape={tuple(q_index.shape)}: must be [B, M, Di] = "
            f"[{batch}, {num_kv_heads}, {cache.k_index.shape[-1]}]"
        )
    if seq_lens.shape != (batch,):
        raise ValueError(f"seq_lens.shape={tuple(seq_lens.shape)}: must be [B] = [{batch}]")
    check_floating(q=q, q_index=q_index)
    check_same_device(k=cache.k, q=q, q_index=q_index)
    check_integer(seq_lens=seq_lens)
    cache.check_lengths(seq_lens)
    check_topk(topk, local_blocks)

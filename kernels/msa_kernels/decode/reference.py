"""Define decoding plainly, one sequence and head at a time."""

import torch
from torch import Tensor

from msa_kernels.decode.cache import DecodeCache
from msa_kernels.select_blocks.reference import select_blocks_reference
from msa_kernels.select_blocks.types import SelectionArgs


def decode_attention_reference(
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
    """Follow the contract of `op.decode_attention` in fp64, for tests.

    Source: MiniMax Sparse Attention (arXiv 2606.13392), section 2, for the last token of a sequence.
    """
    num_sequences, num_heads, dim = q.shape
    num_kv_heads = q_index.shape[1]
    out = torch.zeros(num_sequences, num_heads, dim, dtype=torch.float64)
    lse = torch.full((num_sequences, num_heads), float("-inf"), dtype=torch.float64)
    block_indices = torch.full((num_sequences, num_kv_heads, topk), -1, dtype=torch.int32)
    for b, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        pages = cache.pages(b, length)
        k, v = (
            torch.cat([rows[page] for page in pages])[:length].double().cpu() for rows in (cache.k, cache.v)
        )
        keys = [cache.index_keys(page, slice(None), torch.float64) for page in pages]
        k_index = torch.cat(keys)[:length].cpu()
        # the last token of a document of its own
        selection = SelectionArgs(
            q_index[b : b + 1].cpu(),
            k_index,
            torch.tensor([0, length]),
            block_size=block_size,
            topk=topk,
            local_blocks=local_blocks,
            query_offset=length - 1,
        )
        block_indices[b] = select_blocks_reference(selection)[0][0]
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            chosen = block_indices[b, kv_head]
            # every token of a selected block that the sequence has
            tokens = torch.isin(torch.arange(length) // block_size, chosen[chosen >= 0])
            scores = k[tokens, kv_head] @ q[b, head].double().cpu() * softmax_scale
            lse[b, head] = scores.logsumexp(0)
            out[b, head] = scores.softmax(0) @ v[tokens, kv_head]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out.to(q), lse.to(q.device, lse_dtype), block_indices.to(q.device)

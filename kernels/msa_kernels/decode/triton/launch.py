"""Launch the decoding kernels: torch tensors in, torch tensors out; imports Triton.

Shapes: B sequences, H query heads, M KV heads, D head dim, NB blocks.
"""

import math

import torch
import triton
from torch import Tensor

from msa_kernels.decode.cache import DecodeCache
from msa_kernels.decode.configs import DecodeConfig, decode_config
from msa_kernels.decode.triton.kernel import (
    best_candidates_kernel,
    decode_attention_kernel,
    decode_scores_kernel,
    merge_parts_kernel,
)
from msa_kernels.select_blocks.triton.merge_kernel import merge_kernel

# Candidates that one program ranks: 64 values and ids per thread with 4 warps
_MAX_CANDIDATES = 8192
# Programs that fill a large device: two on each of 132 multiprocessors
_WANTED_PROGRAMS = 264
# Rows of the smallest matrix product
_MIN_ROWS = 16


def decode_attention_triton(
    q: Tensor,
    q_index: Tensor,
    cache: DecodeCache,
    seq_lens: Tensor,
    *,
    block_size: int,
    topk: int,
    local_blocks: int,
    softmax_scale: float,
    config: DecodeConfig | None = None,
    num_parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `decode_attention` on a GPU. Arguments as there, already checked.

    Args:
        config: tile shapes; None: by shape.
        num_parts: programs that share the blocks of a sequence and KV head; None: what fills the device.
    """
    # lengths stay on the device: the launch does not depend on them, so a CUDA graph can hold it
    seq_lens = seq_lens.to(q.device, non_blocking=True).contiguous()
    dim = _padded(max(q.shape[-1], q_index.shape[-1]))
    if config is None:
        config = decode_config(element_bytes=q.element_size(), dim=dim, block_size=block_size)
    scores = _block_scores(
        q_index, cache, seq_lens, block_size=block_size, local_blocks=local_blocks, config=config
    )
    block_indices = _best_blocks(
        scores, seq_lens, block_size=block_size, topk=topk, local_blocks=local_blocks
    )
    out, lse = _attend(
        q,
        cache,
        block_indices,
        seq_lens,
        block_size=block_size,
        softmax_scale=softmax_scale,
        config=config,
        num_parts=num_parts,
    )
    return out, lse, block_indices


def _padded(size: int) -> int:
    """Round up to a power of two that can be the side of a matrix product."""
    return max(_MIN_ROWS, triton.next_power_of_2(size))


def _pages(cache: DecodeCache, unread: Tensor) -> tuple[Tensor, int, int]:
    """Return the page table (of a flat cache, any tensor), the page size and the pages per sequence."""
    table = unread if cache.page_table is None else cache.page_table.contiguous()
    return table, cache.page_size, 1 if cache.page_table is None else table.shape[1]


def _converts_fp8(device: torch.device) -> bool:
    """Ask whether Triton converts float8_e4m3fn on this device; the interpreter and compile checks do."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _blocks_per_program(config: DecodeConfig, num_blocks: int) -> int:
    """Choose what the configuration says, fewer where programs would be few.

    Example (4 by the configuration, 264 programs wanted): 2,000 blocks are taken 4 at a time by 500
    programs, 500 blocks 2 at a time by 250, 100 blocks one at a time.
    """
    return max(1, min(config.blocks_per_program, triton.cdiv(num_blocks, _WANTED_PROGRAMS)))


def _block_scores(
    q_index: Tensor,
    cache: DecodeCache,
    seq_lens: Tensor,
    *,
    block_size: int,
    local_blocks: int,
    config: DecodeConfig,
) -> Tensor:
    """Score all blocks: [B, M, NB] fp32, NB blocks of the longest sequence that the cache can hold."""
    batch, num_kv_heads, dim = q_index.shape
    num_blocks = triton.cdiv(cache.capacity, block_size)
    scores = torch.empty(batch, num_kv_heads, num_blocks, dtype=torch.float32, device=q_index.device)
    keys = cache.k_index if cache.k_index.stride(2) == 1 else cache.k_index.contiguous()
    per_program = _blocks_per_program(config, num_blocks * batch)
    table, page_size, pages_per_sequence = _pages(cache, seq_lens)
    scale = cache.k_index_scale
    if cache.has_fp8_keys:
        keys = keys.view(torch.uint8)
    decode_scores_kernel[(triton.cdiv(num_blocks, per_program), batch)](
        q_index.contiguous(),
        keys,
        scores if scale is None else scale,
        table,
        seq_lens,
        scores,
        num_blocks,
        page_size,
        pages_per_sequence,
        keys.stride(0),
        keys.stride(1),
        0 if scale is None else scale.stride(0),
        0 if scale is None else scale.stride(1),
        per_program,
        M=num_kv_heads,
        MP=_padded(num_kv_heads),
        D=dim,
        DP=_padded(dim),
        B=block_size,
        BP=_padded(block_size),
        LOCAL_BLOCKS=local_blocks,
        HAS_TABLE=cache.page_table is not None,
        USE_DOT=q_index.dtype != torch.float32,
        FP8=cache.has_fp8_keys,
        NATIVE_FP8=cache.has_fp8_keys and _converts_fp8(keys.device),
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return scores


def _best_blocks(
    scores: Tensor, seq_lens: Tensor, *, block_size: int, topk: int, local_blocks: int
) -> Tensor:
    """Take forced and best blocks [B, M, topk] of block scores [B, M, NB]."""
    batch, num_kv_heads, num_candidates = scores.shape
    num_rows, slots = batch * num_kv_heads, max(2, triton.next_power_of_2(topk))
    ids, id_is_column = scores, True
    # With very many blocks: the best of each chunk first. 100,000 candidates become 13 chunks of `slots`
    # each.
    while num_candidates > _MAX_CANDIDATES:
        num_chunks = triton.cdiv(num_candidates, _MAX_CANDIDATES)
        best = torch.empty(num_rows, num_chunks * slots, dtype=torch.float32, device=scores.device)
        best_ids = torch.empty_like(best, dtype=torch.int32)
        best_candidates_kernel[(num_chunks, num_rows)](
            scores,
            ids,
            best,
            best_ids,
            num_candidates,
            num_chunks,
            K=topk,
            KP=slots,
            CHUNK=_MAX_CANDIDATES,
            ID_IS_COLUMN=id_is_column,
            num_warps=8,
        )
        scores, ids, id_is_column, num_candidates = best, best_ids, False, num_chunks * slots
    block_indices = torch.empty(batch, num_kv_heads, topk, dtype=torch.int32, device=scores.device)
    candidates = _padded(num_candidates)
    # each sequence is one document, whose start is not read; the newest token's position is length - 1
    merge_kernel[(num_rows,)](
        scores,
        ids,
        seq_lens,
        seq_lens,
        seq_lens,
        block_indices,
        # no log-sum-exp: nothing is read or written there
        block_indices,
        block_indices,
        block_indices,
        0.0,
        num_rows,
        1,
        0,
        -1,
        num_candidates,
        M=num_kv_heads,
        B=block_size,
        K=topk,
        KP=slots,
        LOCAL_BLOCKS=local_blocks,
        HAS_POSITION=True,
        HAS_VALID=False,
        ROWS=1,
        CP=candidates,
        ID_IS_COLUMN=id_is_column,
        WITH_LSE=False,
        num_warps=8 if candidates > 1024 else 4,
    )
    return block_indices


def _attend(
    q: Tensor,
    cache: DecodeCache,
    block_indices: Tensor,
    seq_lens: Tensor,
    *,
    block_size: int,
    softmax_scale: float,
    config: DecodeConfig,
    num_parts: int | None,
) -> tuple[Tensor, Tensor]:
    """Attend to the tokens of the selected blocks: out [B, H, D] and lse [B, H].

    With few sequences, the slots of a (sequence, KV head) are divided among programs until the device is
    full.

    Example (topk 16, 2 sequences of 4 KV heads): 264 / 8 = 33 programs are wanted for each, more than it has
    slots, so each of 16 programs takes one slot and `merge_parts_kernel` joins them. With 22 sequences it is
    3 programs of 6, 6 and 4 slots.
    """
    batch, num_heads, dim = q.shape
    num_kv_heads, topk = block_indices.shape[1:]
    kv_rows, heads_per_kv_head = batch * num_kv_heads, num_heads // num_kv_heads
    # (sequence, KV head) pairs are what can be done at once without a division
    wanted = triton.cdiv(_WANTED_PROGRAMS, max(1, kv_rows)) if num_parts is None else num_parts
    part_slots: int = triton.cdiv(topk, max(1, min(topk, wanted)))
    num_parts = math.ceil(topk / part_slots)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, num_heads, dtype=torch.float32)
    if kv_rows == 0:
        return out, lse
    part_out, part_lse = out, lse
    if num_parts > 1:
        # fp32 whatever q is: parts are added before they are rounded
        part_out = q.new_empty(kv_rows, num_parts, heads_per_kv_head, dim, dtype=torch.float32)
        part_lse = q.new_empty(kv_rows, num_parts, heads_per_kv_head, dtype=torch.float32)
    k, v = (rows if rows.stride(3) == 1 else rows.contiguous() for rows in (cache.k, cache.v))
    tile_keys = min(config.keys, _padded(block_size))
    table, page_size, pages_per_sequence = _pages(cache, seq_lens)
    use_dot = q.dtype != torch.float32
    # one head at a time where there is no matrix product whose rows they could be
    heads = heads_per_kv_head if use_dot else 1
    decode_attention_kernel[(num_parts, batch * num_heads // heads)](
        q.contiguous(),
        k,
        v,
        block_indices,
        table,
        seq_lens,
        part_out,
        part_lse,
        softmax_scale / math.log(2),
        page_size,
        pages_per_sequence,
        *k.stride()[:3],
        *v.stride()[:3],
        num_parts,
        part_slots,
        M=num_kv_heads,
        G=heads_per_kv_head,
        HEADS=heads,
        HP=_padded(heads) if use_dot else 1,
        D=dim,
        DP=_padded(dim),
        B=block_size,
        KEYS=tile_keys,
        TILES_PER_BLOCK=triton.cdiv(block_size, tile_keys),
        K=topk,
        HAS_TABLE=cache.page_table is not None,
        USE_DOT=use_dot,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    if num_parts > 1:
        merge_parts_kernel[(batch * num_heads,)](
            part_out,
            part_lse,
            out,
            lse,
            num_parts,
            G=heads_per_kv_head,
            D=dim,
            DP=_padded(dim),
            NP=triton.next_power_of_2(num_parts),
            num_warps=4,
        )
    return out, lse

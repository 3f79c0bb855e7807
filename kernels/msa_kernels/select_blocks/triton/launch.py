"""Launch of the scoring kernel: descriptors, grid, buffers. Torch in, torch out; needs triton."""

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msa_kernels.select_blocks.configs import SelectConfig, select_config
from msa_kernels.select_blocks.triton.merge_kernel import merge_kernel
from msa_kernels.select_blocks.triton.score_kernel import select_blocks_kernel

# Programs per multiprocessor to aim for: two run at a time, the rest evens out their lengths.
_PROGRAMS_PER_PROCESSOR = 8
# A part of a range is not worth a program of its own below this many blocks.
_MIN_BLOCKS_PER_SPLIT = 16
_MERGE_CANDIDATES = 4096
# Where no device says how many multiprocessors it has: interpreter, compile checks
_DEFAULT_PROCESSORS = 132
_BYTES_PER_DESCRIPTOR_ROW = 16


def select_blocks_triton(
    q_index: Tensor,
    k_index: Tensor,
    cu_seqlens: Tensor,
    *,
    block_size: int,
    topk: int,
    local_blocks: int = 1,
    query_offset: int = 0,
    query_valid: Tensor | None = None,
    position: Tensor | None = None,
    lse_scale: float | None = None,
    config: SelectConfig | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`select_blocks` on a GPU. Arguments as there, already checked; fp16, bf16 or fp32 of one kind.

    Args:
        lse_scale: factor of the scores in the log-sum-exp; None: not computed.
        config: tile shapes; None: by shape.
        num_splits: programs that share the keys of a tile of queries; None: as many as fill the device.
    """
    num_queries, num_groups, _ = q_index.shape
    out = torch.empty(num_queries, num_groups, topk, dtype=torch.int32, device=q_index.device)
    with_lse = lse_scale is not None
    lse = torch.empty(num_queries, num_groups, device=out.device) if with_lse else None
    num_rows = num_queries * num_groups
    if num_rows == 0:
        return out, lse
    slots = max(2, triton.next_power_of_2(topk))
    q_rows, keys = _rows_for_descriptor(q_index.reshape(num_rows, -1)), _rows_for_descriptor(k_index)
    dim = max(16, triton.next_power_of_2(keys.shape[1]))
    if config is None:
        config = select_config(
            element_bytes=q_index.element_size(),
            dim=dim,
            block_size=block_size,
            slots=slots,
            with_lse=with_lse,
        )
    chunk = min(dim, config.chunk)
    tile_n, tile_blocks, parts = _key_tile(config.tile_n, block_size, with_lse)
    num_tiles = triton.cdiv(num_rows, config.block_m)
    if num_splits is None:
        num_splits = _num_splits(q_index.device, num_tiles, k_index.shape[0] // block_size, slots)
    starts = cu_seqlens.to(q_index.device, non_blocking=True).contiguous()
    num_docs = starts.numel() - 1
    offset = query_offset if position is None else 0
    shared = {
        "NUM_GROUPS": num_groups,
        "BLOCK_SIZE": block_size,
        "TOPK": topk,
        "SLOTS": slots,
        "LOCAL_BLOCKS": local_blocks,
        "HAS_POSITION": position is not None,
        "HAS_VALID": query_valid is not None,
        "WITH_LSE": with_lse,
    }
    # a pointer that is not read may be any
    queries = (
        starts,
        starts if position is None else position.contiguous(),
        starts if query_valid is None else query_valid.contiguous().view(torch.int8),
        out,
    )
    partial_score = partial_id = partial_total = forced_lse = out
    if num_splits > 1:
        partial_score = torch.empty(num_rows, num_splits * slots, dtype=torch.float32, device=out.device)
        partial_id = torch.empty_like(partial_score, dtype=torch.int32)
        if with_lse:
            partial_total = torch.empty_like(partial_score)
            forced_lse = torch.empty(num_rows, dtype=torch.float32, device=out.device)
    of_lse = (
        out if lse is None else lse,
        partial_total,
        forced_lse,
        0.0 if lse_scale is None else lse_scale / math.log(2),
    )
    select_blocks_kernel[(num_tiles * num_splits,)](
        TensorDescriptor.from_tensor(q_rows, [config.block_m, chunk]),
        TensorDescriptor.from_tensor(keys, [tile_n, chunk]),
        *queries,
        partial_score,
        partial_id,
        *of_lse,
        num_rows,
        num_docs,
        (num_docs - 1).bit_length(),
        offset,
        num_splits,
        **shared,
        SPLIT=num_splits > 1,
        # sums of exponentials are formed for tiles that some row takes a block from
        TEST_FIRST=config.test_first or with_lse,
        CHUNK=chunk,
        NUM_CHUNKS=triton.cdiv(dim, chunk),
        BLOCK_M=config.block_m,
        TILE_N=tile_n,
        TILE_BLOCKS=tile_blocks,
        PARTS=parts,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    if num_splits > 1:
        candidates = triton.next_power_of_2(num_splits * slots)
        merge_rows = max(1, 1024 // candidates)
        merge_kernel[(triton.cdiv(num_rows, merge_rows),)](
            partial_score,
            partial_id,
            *queries,
            *of_lse,
            num_rows,
            num_docs,
            (num_docs - 1).bit_length(),
            offset,
            num_splits * slots,
            **shared,
            BLOCK_M=merge_rows,
            CANDIDATES=candidates,
            ID_IS_COLUMN=False,
            num_warps=4,
        )
    return out, lse


def _key_tile(wanted: int, block_size: int, with_lse: bool) -> tuple[int, int, int]:
    """Keys of a tile, a power of two, of which at least 16; the blocks that it holds; its number in a block.

    Example: 64 wanted are 4 blocks of 16, one of 48 and padding, or a half of one of 128.
    """
    if not with_lse and 16 <= wanted < block_size and block_size % wanted == 0:
        return wanted, 1, block_size // wanted
    blocks = max(1, wanted // block_size) if block_size & (block_size - 1) == 0 else 1
    return max(16, triton.next_power_of_2(blocks * block_size)), blocks, 1


def _num_splits(device: torch.device, num_tiles: int, num_blocks: int, slots: int) -> int:
    """Programs per tile of rows, from sizes alone: positions on the device would have to be waited for."""
    processors = _DEFAULT_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = _PROGRAMS_PER_PROCESSOR * processors // num_tiles
    return max(1, min(wanted, num_blocks // _MIN_BLOCKS_PER_SPLIT, _MERGE_CANDIDATES // slots))


def _rows_for_descriptor(rows: Tensor) -> Tensor:
    """The same [N, D], such that the copy engine can read it: rows of whole 16 bytes, on 16-byte borders."""
    step = _BYTES_PER_DESCRIPTOR_ROW // rows.element_size()
    extra = -rows.shape[1] % step
    if extra:
        return torch.nn.functional.pad(rows, (0, extra))
    if rows.stride(1) != 1 or rows.stride(0) % step or rows.data_ptr() % _BYTES_PER_DESCRIPTOR_ROW:
        return rows.clone(memory_format=torch.contiguous_format)
    return rows

"""Launch the scoring kernel: descriptors, grid, buffers. Torch in, torch out; imports Triton."""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msa_kernels.operators import Launched
from msa_kernels.select_blocks.configs import SelectConfig, select_config
from msa_kernels.select_blocks.triton.merge_kernel import merge_kernel
from msa_kernels.select_blocks.triton.score_kernel import select_blocks_kernel
from msa_kernels.select_blocks.types import SelectionArgs

# Programs per multiprocessor to aim for: two run at a time, the rest evens out their lengths.
_PROGRAMS_PER_PROCESSOR = 8
# A part of a range is not worth a program of its own below this many blocks.
_MIN_BLOCKS_PER_SPLIT = 16
_MERGE_CANDIDATES = 4096
# Where no device says how many multiprocessors it has: interpreter, compile checks
_DEFAULT_PROCESSORS = 132
_BYTES_PER_DESCRIPTOR_ROW = 16


def select_blocks_triton(
    args: SelectionArgs, *, config: SelectConfig | None = None, num_splits: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run `select_blocks` on a GPU; inputs are fp16, bf16 or fp32 of one kind.

    Args:
        args: checked already.
        config: tile shapes; None: by shape.
        num_splits: programs that share the keys of a tile of queries; None: as many as fill the device.

    Returns:
        block_indices [T, M, topk] int32, and lse [T, M] fp32 or None.
    """
    q_index, k_index, block_size, topk = args.q_index, args.k_index, args.block_size, args.topk
    T, M, _ = q_index.shape
    device, with_lse = q_index.device, args.lse_scale is not None
    out = torch.empty(T, M, topk, dtype=torch.int32, device=device)
    lse = torch.empty(T, M, device=device) if with_lse else None
    num_rows = T * M
    if num_rows == 0:
        return out, lse
    slots = max(2, triton.next_power_of_2(topk))
    q_rows, keys = _rows_for_descriptor(q_index.reshape(num_rows, -1)), _rows_for_descriptor(k_index)
    # products of 8 bits take 32 channels at a time, of 16 bits 16
    dim = max(16 if args.key_scale is None else 32, triton.next_power_of_2(keys.shape[1]))
    if config is None:
        config = select_config(
            element_bytes=q_index.element_size(),
            dim=dim,
            block_size=block_size,
            slots=slots,
            with_lse=with_lse,
        )
    chunk = min(dim, config.chunk)
    tile_keys, tile_blocks, parts = _key_tile(config.keys, block_size, with_lse)
    num_tiles = triton.cdiv(num_rows, config.rows)
    if num_splits is None:
        num_splits = _num_splits(device, num_tiles, k_index.shape[0] // block_size, slots)
    queries, documents, shared = _queries_of(args, out, slots)
    score_part = id_part = total_part = forced_lse = out
    if num_splits > 1:
        score_part = torch.empty(num_rows, num_splits * slots, dtype=torch.float32, device=device)
        id_part = torch.empty_like(score_part, dtype=torch.int32)
        if with_lse:
            total_part = torch.empty_like(score_part)
            forced_lse = torch.empty(num_rows, dtype=torch.float32, device=device)
    of_lse = (
        out if lse is None else lse,
        total_part,
        forced_lse,
        # exponentials are taken to base 2, which is one instruction
        0.0 if args.lse_scale is None else args.lse_scale / math.log(2),
    )
    Launched(select_blocks_kernel)[(num_tiles * num_splits,)](
        TensorDescriptor.from_tensor(q_rows, [config.rows, chunk]),
        TensorDescriptor.from_tensor(keys, [tile_keys, chunk]),
        # read beyond the last key, by as much as a tile may be
        out if args.key_scale is None else torch.nn.functional.pad(args.key_scale, (0, tile_keys)),
        *queries,
        score_part,
        id_part,
        *of_lse,
        num_rows,
        *documents,
        num_splits,
        **shared,
        SPLIT=num_splits > 1,
        # sums of exponentials are formed for tiles that some row takes a block from
        TEST_FIRST=config.test_first or with_lse,
        FP8=args.key_scale is not None,
        CHUNK=chunk,
        NUM_CHUNKS=triton.cdiv(dim, chunk),
        ROWS=config.rows,
        KEYS=tile_keys,
        TILE_BLOCKS=tile_blocks,
        PARTS=parts,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    if num_splits > 1:
        candidates = triton.next_power_of_2(num_splits * slots)
        # so many rows that a program of 4 warps has 8 candidates per thread
        merge_rows = max(1, 1024 // candidates)
        Launched(merge_kernel)[(triton.cdiv(num_rows, merge_rows),)](
            score_part,
            id_part,
            *queries,
            *of_lse,
            num_rows,
            *documents,
            num_splits * slots,
            **shared,
            ROWS=merge_rows,
            CP=candidates,
            ID_IS_COLUMN=False,
            num_warps=4,
        )
    return out, lse


def _queries_of(
    args: SelectionArgs, out: Tensor, slots: int
) -> tuple[tuple[Tensor, ...], tuple[int, int, int], dict[str, Any]]:
    """Return arguments that both kernels share: pointers, sizes of documents and offset, constants."""
    # document starts may lie on the host, where they were checked; copying them does not wait
    starts = args.cu_seqlens.to(out.device, non_blocking=True).contiguous()
    num_docs = starts.numel() - 1
    pointers = (
        starts,
        # a pointer that is not read may be any
        starts if args.position is None else args.position.contiguous(),
        starts if args.query_valid is None else args.query_valid.contiguous().view(torch.int8),
        out,
    )
    # halvings that find one of num_docs documents: 2 for 3 of them
    search_steps = (num_docs - 1).bit_length()
    constants = {
        "M": args.q_index.shape[1],
        "B": args.block_size,
        "K": args.topk,
        "KP": slots,
        "LOCAL_BLOCKS": args.local_blocks,
        "HAS_POSITION": args.position is not None,
        "HAS_VALID": args.query_valid is not None,
        "WITH_LSE": args.lse_scale is not None,
    }
    return pointers, (num_docs, search_steps, args.query_offset if args.position is None else 0), constants


def _key_tile(wanted: int, block_size: int, with_lse: bool) -> tuple[int, int, int]:
    """Fit a tile to the blocks: its keys, a power of two from 16 on; blocks it holds; tiles of one block.

    Example: 64 wanted are (64, 4, 1), 4 blocks of 16; (64, 1, 1), one of 48 and padding; or (64, 1, 2), half
    of one of 128.
    """
    if not with_lse and 16 <= wanted < block_size and block_size % wanted == 0:
        return wanted, 1, block_size // wanted
    blocks = max(1, wanted // block_size) if block_size & (block_size - 1) == 0 else 1
    return max(16, triton.next_power_of_2(blocks * block_size)), blocks, 1


def _num_splits(device: torch.device, num_tiles: int, num_blocks: int, slots: int) -> int:
    """Choose the programs per tile of rows, from sizes alone: one would have to wait for positions.

    Example (132 multiprocessors): 1,056 programs are wanted, so that 128 tiles of rows have 8 each; with 100
    blocks only 6, as less than 16 blocks are not worth a program.
    """
    processors = _DEFAULT_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    # few rows: without a division of their keys most processors would be idle
    wanted = _PROGRAMS_PER_PROCESSOR * processors // num_tiles
    return max(1, min(wanted, num_blocks // _MIN_BLOCKS_PER_SPLIT, _MERGE_CANDIDATES // slots))


def _rows_for_descriptor(rows: Tensor) -> Tensor:
    """Return the same [N, D] as the copy engine can read it: rows of whole 16 bytes, on 16-byte borders."""
    step = _BYTES_PER_DESCRIPTOR_ROW // rows.element_size()
    # bf16 has 8 values in 16 bytes: rows of 20 are padded to 24
    extra = -rows.shape[1] % step
    if extra and rows.element_size() == 1:
        # torch pads no float8; its zero has no bit set
        return torch.nn.functional.pad(rows.view(torch.uint8), (0, extra)).view(rows.dtype)
    if extra:
        return torch.nn.functional.pad(rows, (0, extra))
    if rows.stride(1) != 1 or rows.stride(0) % step or rows.data_ptr() % _BYTES_PER_DESCRIPTOR_ROW:
        return rows.clone(memory_format=torch.contiguous_format)
    return rows

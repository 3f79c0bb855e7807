"""Select key blocks: choice of the implementation, and the tiled one in torch.

No query-by-sequence score matrix is ever held.

Shapes: T queries of this call, M KV heads, D index head dim, S keys of the whole pack, NB = S / block_size.
"""

from bisect import bisect_right
from typing import Literal, overload

import torch
from torch import Tensor

from msa_kernels.arguments import (
    check_cu_seqlens,
    check_floating,
    check_integer,
    check_same_device,
    check_topk,
    check_values,
)
from msa_kernels.dispatch import choose_kernel
from msa_kernels.select_blocks.lse import selected_lse
from msa_kernels.select_blocks.reference import select_blocks_reference
from msa_kernels.select_blocks.types import SelectionArgs

# Elements of one score tile: 1 MiB in fp32, inside a CPU core's own cache.
_TILE_ELEMENTS = 2**18
_QUERY_TILE = 256


@overload
def select_blocks(
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
    kernel: str = "auto",
    fp8: bool = False,
    return_lse: Literal[False] = False,
    index_scale: float | None = None,
) -> Tensor: ...


@overload
def select_blocks(
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
    kernel: str = "auto",
    fp8: bool = False,
    return_lse: Literal[True],
    index_scale: float | None = None,
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def select_blocks(
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
    kernel: str = "auto",
    fp8: bool = False,
    return_lse: bool = False,
    index_scale: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Select, for every query and KV head, the key blocks it attends to.

    The score of a block is the largest index score of its visible tokens. The last `local_blocks`
    blocks up to the query's own are always taken and use top-k slots. Blocks of other documents
    and of the future are never taken. Ties go to the lower block id, so the result is a function of
    the scores alone.

    Example (block_size 2, topk 2, one document of 6 tokens, one KV head, query at position 5): block scores
    [0.9, 0.3, own] give [0, 2]; the query at position 1 sees one block and gives [0, -1].

    Args:
        q_index: [T, M, D] index queries of consecutive positions `query_offset ...`, or of those in
            `position`, any float dtype.
        k_index: [S, D] index keys of the whole pack, in sequence order.
        cu_seqlens: [num_docs + 1] int, block-aligned document starts; the last entry is S.
        block_size: tokens per key block.
        topk: blocks per query and KV head.
        local_blocks: forced blocks, the query's own included; at most topk.
        query_offset: position of the first query in the pack.
        query_valid: [T] bool, False for padding queries, which select nothing. None: all valid.
        position: [T] int64, ascending positions of the queries in the pack, for some queries out of many;
            takes the place of query_offset. None: consecutive ones.
        kernel: "triton" (GPUs; fp32, fp16, bf16), "cpu" (tiled, in torch, any device), "reference" (the
            definition, slow), or "auto": Triton where it is installed, for tensors on a GPU, else "cpu".
        fp8: score index queries and keys that are rounded to float8_e4m3fn, one power of two to each: faster,
            and another selection (benchmarks/results/fp8_index_keys.md). For inference and studies; not with
            return_lse.
        return_lse: also return the log-sum-exp of the selected tokens' scores, the student's denominator in
            the KL loss (`PoolOutput.lse_index` over all pools).
        index_scale: factor of the scores in this log-sum-exp, above 0; a temperature divides it. None:
            D^-0.5. The selection does not depend on it.

    Returns:
        block_indices: [T, M, topk] int32, global block ids ascending, -1 on the right for empty slots.
        With return_lse also lse [T, M] fp32 (fp64 for fp64 inputs), natural log: over the tokens of the
        selected blocks up to the query; -inf where nothing is selected.

    Raises:
        ValueError: on shapes, dtypes, devices or sizes that do not fit, and on positions and document starts
            out of range (tensors on a device: only where MSA_KERNELS_CHECK=1, since looking means waiting).

    Source: arXiv 2606.13392 section 2. The softmax scale is left out; it does not change the ranking.
    """
    args = SelectionArgs(
        q_index=q_index,
        k_index=k_index,
        cu_seqlens=cu_seqlens,
        block_size=block_size,
        topk=topk,
        local_blocks=local_blocks,
        query_offset=query_offset,
        query_valid=query_valid,
        position=position,
        return_lse=return_lse,
        index_scale=index_scale,
    )
    _check(args)
    _check_queries(args)
    if index_scale is not None and not index_scale > 0:
        raise ValueError(f"index_scale={index_scale}: must be above 0; leave it out for D^-0.5")
    chosen = choose_kernel(kernel, q_index.device, not_in_triton(q_index, k_index, block_size, topk))
    if fp8:
        if return_lse:
            raise ValueError("fp8=True: forms no log-sum-exp; leave out return_lse")
        args = args.in_fp8(restored=chosen != "triton")
    if chosen == "triton":
        # triton is not installed everywhere
        from msa_kernels.select_blocks.triton.launch import select_blocks_triton as implementation
    else:
        implementation = select_blocks_reference if chosen == "reference" else _select_blocks_tiled
    block_indices, lse = implementation(args)
    return block_indices if lse is None else (block_indices, lse)


def _select_blocks_tiled(args: SelectionArgs) -> tuple[Tensor, Tensor | None]:
    """Select blocks of a tile of queries at a time; forced blocks get score inf, hidden ones -inf.

    Example (block_size 2, topk 2, one KV head, query at position 5 of a document from 0 on): block scores
    [0.9, 0.3, 0.1] become [0.9, 0.3, inf], the last block being the query's own, and give [0, 2].
    """
    T, M, _ = args.q_index.shape
    device, block_size = args.q_index.device, args.block_size
    compute_dtype = torch.float64 if args.q_index.dtype == torch.float64 else torch.float32
    result = torch.full((T, M, args.topk), -1, dtype=torch.int32, device=device)
    starts = args.cu_seqlens.to(device=device, dtype=torch.int64)
    host_starts = args.cu_seqlens.tolist()
    offset, position = args.query_offset, args.position
    places = range(offset, offset + T) if position is None else position.tolist()
    keys = args.k_index.to(compute_dtype)
    for begin in range(0, T, _QUERY_TILE):
        end = min(begin + _QUERY_TILE, T)
        if position is None:
            tile_position = torch.arange(offset + begin, offset + end, device=device)
        else:
            tile_position = position[begin:end]
        doc_start = starts[torch.searchsorted(starts, tile_position, right=True) - 1]
        # Positions ascend: the first query's document begins with the first block that any query of the tile
        # sees.
        first_block = host_starts[bisect_right(host_starts, places[begin]) - 1] // block_size
        last_block = places[end - 1] // block_size
        scores = _block_scores(
            args.q_index[begin:end].to(compute_dtype), keys, first_block, last_block + 1, block_size
        )
        block = torch.arange(first_block, last_block + 1, device=device)
        own = tile_position[:, None] // block_size
        hidden = (block > own) | (block < doc_start[:, None] // block_size)
        # No token masks: the only block of which a query sees a part is its own, which is forced.
        forced = (block > own - args.local_blocks) & ~hidden
        scores.masked_fill_(forced[:, None], float("inf")).masked_fill_(hidden[:, None], float("-inf"))
        if args.query_valid is not None:
            scores.masked_fill_(~args.query_valid[begin:end, None, None], float("-inf"))
        chosen = topk_lowest_id(scores.flatten(0, 1), args.topk)
        width = chosen.shape[-1]
        chosen = torch.where(chosen >= 0, chosen + first_block, chosen)
        result[begin:end, :, :width] = chosen.view(end - begin, M, width).to(torch.int32)
    if args.lse_scale is None:
        return result, None
    if position is None:
        position = torch.arange(offset, offset + T, device=device)
    lse = selected_lse(args.q_index, keys, result, position, block_size=block_size, scale=args.lse_scale)
    return result, lse


def _block_scores(queries: Tensor, keys: Tensor, first: int, stop: int, block_size: int) -> Tensor:
    """Take the largest token score per block: queries [t, M, D], keys [S, D] -> [t, M, stop - first].

    Keys are the rows of the product, so that the maximum over a block runs along whole vectors of queries.
    """
    num_queries, num_kv_heads, dim = queries.shape
    columns = queries.reshape(-1, dim).T
    num_columns = columns.shape[1]
    blocks_per_tile = max(1, _TILE_ELEMENTS // (num_columns * block_size))
    scores = queries.new_empty(stop - first, num_columns)
    for begin in range(first, stop, blocks_per_tile):
        end = min(begin + blocks_per_tile, stop)
        tile = keys[begin * block_size : end * block_size] @ columns
        tile = tile.view(end - begin, block_size, num_columns)
        torch.amax(tile, dim=1, out=scores[begin - first : end - first])
    return scores.T.reshape(num_queries, num_kv_heads, stop - first)


def topk_lowest_id(scores: Tensor, topk: int) -> Tensor:
    """Rank each row's scores: ids of the `topk` largest, ascending, -1 on the right; ties to the lower id.

    scores [R, NB] -> [R, min(topk, NB)] int64. -inf is never chosen. Example (topk 2): [5, 7, 5, -inf] gives
    [0, 1], [-inf, 3, -inf, -inf] gives [1, -1].
    `torch.topk` leaves open which of several equal scores it takes, so rows with a tie at the threshold
    are ranked again with a stable sort.
    """
    num_blocks = scores.shape[-1]
    width = min(topk, num_blocks)
    # one more than is taken: it tells whether the last one taken is tied with the first refused
    values, ids = scores.topk(min(width + 1, num_blocks), dim=-1)
    if num_blocks > width:
        threshold, below = values[:, width - 1], values[:, width]
        tied = ((threshold == below) & (threshold > float("-inf"))).nonzero().squeeze(-1)
        if tied.numel():
            ranked, order = scores[tied].sort(dim=-1, descending=True, stable=True)
            values[tied, :width], ids[tied, :width] = ranked[:, :width], order[:, :width]
    # num_blocks stands for none until all are sorted, so that it ends on the right
    ids = ids[:, :width].masked_fill(values[:, :width] == float("-inf"), num_blocks)
    ids = ids.sort(dim=-1).values
    return ids.masked_fill_(ids == num_blocks, -1)


def not_in_triton(q_index: Tensor, k_index: Tensor, block_size: int, topk: int) -> str | None:
    """Return why there is no Triton kernel for these arguments, None if there is one."""
    if q_index.dtype not in (torch.float32, torch.float16, torch.bfloat16) or q_index.dtype != k_index.dtype:
        return (
            f"q_index.dtype={q_index.dtype}, k_index.dtype={k_index.dtype}: must be one of fp32, fp16, bf16"
        )
    if not 1 <= q_index.shape[-1] <= 256:
        return f"D={q_index.shape[-1]}: must be from 1 to 256"
    if not 1 <= block_size <= 256:
        return f"block_size={block_size}: must be from 1 to 256"
    return None if topk <= 64 else f"topk={topk}: must be from 1 to 64"


def _check(args: SelectionArgs) -> None:
    """Raise ValueError on shapes, dtypes, devices and sizes that do not fit."""
    q_index, k_index, block_size = args.q_index, args.k_index, args.block_size
    if q_index.dim() != 3 or k_index.dim() != 2 or q_index.shape[-1] != k_index.shape[-1]:
        raise ValueError(
            f"q_index.shape={tuple(q_index.shape)}, k_index.shape={tuple(k_index.shape)}: "
            "must be [T, num_kv_heads, D] and [S, D]"
        )
    if 0 in q_index.shape[1:]:
        raise ValueError(f"q_index.shape={tuple(q_index.shape)}: num_kv_heads and D must be at least 1")
    check_floating(q_index=q_index, k_index=k_index)
    check_same_device(q_index=q_index, k_index=k_index)
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: must be at least 1")
    seq_len = k_index.shape[0]
    if seq_len % block_size:
        raise ValueError(f"S={seq_len}: must be a multiple of block_size={block_size}; pad the pack")
    if args.query_offset < 0 or args.query_offset + q_index.shape[0] > seq_len:
        raise ValueError(
            f"query_offset={args.query_offset}: must not be negative, and with T={q_index.shape[0]} queries "
            f"it must not exceed S={seq_len}"
        )
    check_topk(args.topk, args.local_blocks)
    check_cu_seqlens(args.cu_seqlens, seq_len, block_size)


def _check_queries(args: SelectionArgs) -> None:
    """Raise ValueError on positions and padding that do not fit the queries."""
    position, query_valid = args.position, args.query_valid
    num_queries, seq_len = args.q_index.shape[0], args.k_index.shape[0]
    check_same_device(q_index=args.q_index, position=position, query_valid=query_valid)
    if position is not None:
        if position.shape != (num_queries,):
            raise ValueError(f"position.shape={tuple(position.shape)}: must be [T] = [{num_queries}]")
        check_integer(position=position)
        check_values("position", position, 0, seq_len - 1, f"from 0 to S - 1 = {seq_len - 1}")
    if query_valid is None:
        return
    if query_valid.shape != (num_queries,):
        raise ValueError(f"query_valid.shape={tuple(query_valid.shape)}: must be [T] = [{num_queries}]")
    if query_valid.dtype != torch.bool:
        raise ValueError(f"query_valid.dtype={query_valid.dtype}: must be torch.bool; compare with 0")

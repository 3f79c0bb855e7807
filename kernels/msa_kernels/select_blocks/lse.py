"""Form the log-sum-exp of the index scores over selected tokens, in torch, on any device.

Shapes: T queries, M KV heads, D index head dim, K slots, R = T * M rows (query, KV head), B block size.
"""

import math

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.work_list import build_work_list

# (row, slot) pairs that are sorted at a time, and scores of one tile
_PAIRS = 2**19
_TILE_ELEMENTS = 2**20
# Index queries per matrix product: at least and at most
_MIN_ROWS, _MAX_ROWS = 8, 512
# Index queries that cost as much as an item on its own: reading the block, starting the product
_ROWS_PER_ITEM = 64


def selected_lse(
    q_index: Tensor,
    k_index: Tensor,
    block_indices: Tensor,
    position: Tensor,
    *,
    block_size: int,
    scale: float,
) -> Tensor:
    """Take the log of the sum of exp(scale * q . k) over the tokens of the selected blocks up to the query.

    The blocks' queries are gathered, so that a block is read once for many of them; scores of other blocks
    are not formed.

    Example (block_size 2, one KV head, scale 1): a query at position 4 with blocks [0, 2] and scores 1, 2,
    0, 3, 5 of tokens 0 to 4 has log(e^1 + e^2 + e^5) = 5.06.

    Args:
        q_index: [T, M, D]; k_index: [S, D], any float dtype.
        block_indices: [T, M, K] int32, -1 for none.
        position: [T] int64, of the queries in the pack.
        block_size: B. scale: factor of the scores.

    Returns:
        [T, M] fp32 (fp64 for fp64 inputs), -inf where nothing is selected.
    """
    dtype = torch.float64 if q_index.dtype == torch.float64 else torch.float32
    num_queries, num_kv_heads, num_slots = block_indices.shape
    keys = k_index.reshape(-1, block_size, k_index.shape[1])
    result = torch.empty(num_queries, num_kv_heads, dtype=dtype, device=q_index.device)
    step = max(1, _PAIRS // (num_kv_heads * num_slots))
    for begin in range(0, num_queries, step):
        chunk = slice(begin, begin + step)
        queries = q_index[chunk].to(dtype).flatten(0, 1) * scale
        rows = position[chunk].repeat_interleave(num_kv_heads)
        lse = _portion(queries, keys, block_indices[chunk].flatten(0, 1).long(), rows)
        result[chunk] = lse.view(-1, num_kv_heads)
    return result


def _portion(queries: Tensor, keys: Tensor, blocks: Tensor, position: Tensor) -> Tensor:
    """Serve one portion: queries [R, D] times scale, keys [NB, B, D], blocks [R, K], position [R] -> [R].

    Two lists of work: blocks that lie wholly before the query, and its own, the only one that needs a mask.
    """
    num_rows, num_slots = blocks.shape
    num_blocks, block_size, _ = keys.shape
    # one more pair at the end, for what items have no query for
    part = queries.new_full((num_rows * num_slots + 1,), float("-inf"))
    own = blocks == (position // block_size)[:, None]
    for keep, masked in (((blocks >= 0) & ~own, False), (own, True)):
        width = _rows_per_item(int(keep.sum()) / num_blocks)
        work = build_work_list(blocks, keep, num_physical_blocks=num_blocks, rows_per_item=width)
        per_batch = max(1, _TILE_ELEMENTS // (width * block_size))
        for first in range(0, work.physical_block.numel(), per_batch):
            items = slice(first, first + per_batch)
            pair, block = work.pair[items], work.physical_block[items]
            row = pair.clamp(min=0) // num_slots
            scores = queries[row] @ keys[block].to(queries.dtype).mT
            if masked:
                token = block[:, None] * block_size + torch.arange(block_size, device=row.device)
                scores.masked_fill_(token[:, None] > position[row][:, :, None], float("-inf"))
            # empty places of items write to the extra pair, which is cut off below
            target = torch.where(pair < 0, num_rows * num_slots, pair)
            part[target] = scores.logsumexp(-1)
    return part[:-1].view(num_rows, num_slots).logsumexp(1)


def _rows_per_item(rows_per_block: float) -> int:
    """Choose the power of 2 of least work; a block's last item is half empty, and every item costs some more.

    With n rows per block, (n + W / 2) * (1 + c / W) is least near W = sqrt(2 * n * c). Example: 100 rows per
    block give sqrt(12,800) = 113, so 128.
    """
    exponent = round(math.log2(max(1.0, math.sqrt(2 * rows_per_block * _ROWS_PER_ITEM))))
    return min(_MAX_ROWS, max(_MIN_ROWS, 1 << exponent))

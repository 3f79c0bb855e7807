"""Cut the queries of the tiled path into portions, and the blocks they read into items of work.

Shapes: T queries, M KV heads, G query heads of each, R = rows (query, KV head) of one portion, K top-k
slots, N physical blocks, B block size, D head dim, Di index head dim, I items, W rows per item.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from msa_kernels.block_sparse_attention.types import BlockPool, SparseQueries
from msa_kernels.block_sparse_attention.window import TokenWindow
from msa_kernels.block_sparse_attention.work_list import WorkList, build_work_list

# Values of one score tile, which should stay near the core, and at least of the buffer that holds a partial
# result per (row, slot) pair.
_TILE_ELEMENTS = 2**20
_SLOT_ELEMENTS = 2**25
# The buffer grows to this share of the queries: so many of them are taken at a time that each block is read
# by the same number, however long the sequence.
_SLOT_SHARE = 0.25
# Query vectors per matrix product at most: enough for its full speed, few enough to leave little of it empty
_ROWS_PER_PRODUCT = 512
# Query vectors that cost as much as an item on its own: reading the block, starting the products
_ROWS_PER_ITEM = 64


def portions(num_queries: int, elements_per_query: int, num_slots: int) -> Iterator[slice]:
    """Yield consecutive queries, as many at a time as the buffer of partial results holds.

    Example (M3: 4 KV heads of 16 heads of 128 channels, 16 slots): 8,192 elements per query and 131,072 with
    the slots, of which a buffer of 2^25 holds 256 queries. Of 65,536 queries a quarter, 2^27 values, are
    more: 1,024.
    """
    most = max(_SLOT_ELEMENTS, int(_SLOT_SHARE * num_queries * elements_per_query))
    size = max(1, most // (elements_per_query * num_slots))
    for begin in range(0, num_queries, size):
        yield slice(begin, min(begin + size, num_queries))


class Scratch:
    """Keep buffers that one portion after the other uses, as the system clears new memory every time."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def empty(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return a tensor of any content, valid until the next call with this name."""
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size:
            kept = self._kept[name] = like.new_empty(size)
        return kept[:size].view(shape)


class Chunk:
    """Flatten consecutive queries to rows (query, KV head) and list their work."""

    def __init__(self, queries: SparseQueries, pool: BlockPool, block_table: Tensor, chunk: slice) -> None:
        self.queries, self.pool, self.dtype = queries, pool, queries.compute_dtype
        q = queries.q[chunk]
        self.num_queries, self.M, self.G, self.D = q.shape
        self.K = block_table.shape[2]
        # Scaled here, so that dK = ds^T q carries the factor already; dq gets it at the end.
        self.q = (q.to(self.dtype) * queries.softmax_scale).flatten(0, 1)
        self.q_index = None
        if queries.q_index is not None:
            self.q_index = (queries.q_index[chunk].to(self.dtype) * queries.index_scale).flatten(0, 1)
        self.position = queries.position[chunk].repeat_interleave(self.M)
        self.block_table = block_table[chunk].flatten(0, 1)
        self.window = None
        if queries.window is not None:
            edges = (queries.window.start[chunk], queries.window.sink_stop[chunk])
            self.window = TokenWindow(*(edge.repeat_interleave(self.M) for edge in edges))
        self.used, self.partial = self._seen()

    def _seen(self) -> tuple[Tensor, Tensor]:
        """Find slots of which their row sees tokens, and slots of which it sees a part only: [R, K] bool.

        Example (B 4, window from token 5 on, no sink, query at 13): of blocks 0, 1, 2, 3 it sees nothing,
        tokens 5 to 7, all, and 12 to 13; used is [no, yes, yes, yes], partial [yes, yes, no, yes].
        """
        block_size = self.pool.kv.shape[2]
        used = self.block_table >= 0
        if self.pool.block.numel() == 0:
            return used, used
        block = self.pool.block[self.block_table.clamp(min=0)]
        partial = block == (self.position // block_size)[:, None]
        if self.window is not None:
            begin, edge = block * block_size, self.window.start[:, None]
            cut = (begin < edge) & (begin >= self.window.sink_stop[:, None])
            used &= ~cut | (begin + block_size > edge)
            partial |= cut
        return used, partial

    def slots(self, scratch: Scratch, name: str, *shape: int) -> Tensor:
        """Return [R * K + 1, *shape], 0 where nothing will be written, and one more pair at the end.

        The empty places of items write to that one.
        """
        buffer = scratch.empty(name, self.q, self.q.shape[0] * self.K + 1, *shape)
        unused = (~self.used).flatten().nonzero().squeeze(-1)
        return buffer.index_fill_(0, unused, 0)

    def work(self) -> Iterator[tuple[WorkList, bool]]:
        """Yield work lists with a flag: True where the query sees only a part of the block (mask needed)."""
        num_physical_blocks, block_size = self.pool.kv.shape[0], self.pool.kv.shape[2]
        if num_physical_blocks == 0:
            return
        for keep, masked in ((self.used & ~self.partial, False), (self.used & self.partial, True)):
            rows_per_item = self._rows_per_item(keep, num_physical_blocks, masked)
            work = build_work_list(
                self.block_table, keep, num_physical_blocks=num_physical_blocks, rows_per_item=rows_per_item
            )
            # items of one batch are one batched product: as many as fill a score tile
            per_batch = max(1, _TILE_ELEMENTS // (rows_per_item * self.G * block_size))
            for first in range(0, work.physical_block.numel(), per_batch):
                items = slice(first, first + per_batch)
                yield WorkList(pair=work.pair[items], physical_block=work.physical_block[items]), masked

    def _rows_per_item(self, keep: Tensor, num_physical_blocks: int, masked: bool) -> int:
        """Choose the power of 2 of least work: a block's last item is half empty, every item costs some more.

        With n rows per block, (n + W / 2) * (1 + c / (W * G)) is least near W = sqrt(2 * n * c / G): its
        derivative is 1/2 - n * c / (G * W^2). Example: 512 rows per block and 16 heads give sqrt(4,096) =
        64, of which a product of 512 query vectors holds 32.
        """
        most = max(8, _ROWS_PER_PRODUCT // self.G)
        if masked:
            # the queries of the block itself, and no others
            exponent = (self.pool.kv.shape[2] - 1).bit_length()
        else:
            width = math.sqrt(2 * int(keep.sum()) / num_physical_blocks * _ROWS_PER_ITEM / self.G)
            exponent = round(math.log2(max(width, 1.0)))
        return min(most, max(8, 1 << exponent))

    def scores(self, work: WorkList, row: Tensor, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Form q [I, W*G, D], k, v [I, B, D] and scaled scores [I, W*G, B], -inf where hidden."""
        q = rows_at(self.q, row).view(row.shape[0], -1, self.D)
        kv = self.pool.kv.index_select(0, work.physical_block).to(self.dtype)
        scores = torch.bmm(q, kv[:, 0].transpose(1, 2))
        if masked:
            hidden = self._hidden(work, row)
            scores.view(*row.shape, self.G, -1).masked_fill_(hidden[:, :, None], float("-inf"))
        return q, kv[:, 0], kv[:, 1], scores

    def index_scores(self, work: WorkList, row: Tensor, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Form index queries [I, W, Di], index keys [I, B, Di] and scaled index scores [I, W, B]."""
        assert self.q_index is not None, "index scores need index queries"
        assert self.queries.k_index is not None, "index scores need index keys"
        q = rows_at(self.q_index, row)
        k = self.queries.k_index.index_select(0, self.pool.block[work.physical_block]).to(self.dtype)
        scores = torch.bmm(q, k.transpose(1, 2))
        if masked:
            scores.masked_fill_(self._hidden(work, row), float("-inf"))
        return q, k, scores

    def _hidden(self, work: WorkList, row: Tensor) -> Tensor:
        """Mark tokens of the item's block that its rows do not see: [I, W, B] bool."""
        block_size = self.pool.kv.shape[2]
        token = torch.arange(block_size, device=row.device)
        token = self.pool.block[work.physical_block][:, None] * block_size + token
        token = token[:, None, :]
        hidden = token > self.position[row][:, :, None]
        if self.window is not None:
            before = token < self.window.start[row][:, :, None]
            hidden |= before & (token >= self.window.sink_stop[row][:, :, None])
        return hidden


def rows_at(rows: Tensor, row: Tensor) -> Tensor:
    """Gather rows [R, ...] at row [I, W]: [I, W, ...]."""
    return rows.index_select(0, row.flatten()).view(*row.shape, *rows.shape[1:])


def finite(lse: Tensor) -> Tensor:
    """Replace -inf, of rows that see nothing, by 0: -inf - -inf would not be a number."""
    return lse.masked_fill(lse == float("-inf"), 0.0)

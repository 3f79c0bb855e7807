"""Cut a call into portions of queries, with the sizes and the schedule that its kernels need. Imports Triton.

Shapes: T queries, M KV heads, G query heads of each, K top-k slots, N physical blocks, B block size, D head
dim, Di index head dim. A pair is a (row, slot) pair, a row (query, KV head).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton
from torch import Tensor

from msa_kernels.arguments import check_int64
from msa_kernels.block_sparse_attention import configs
from msa_kernels.block_sparse_attention.triton.schedule import (
    Items,
    Schedule,
    build_schedule,
    queries_per_portion,
)
from msa_kernels.block_sparse_attention.types import BlockPool, SparseQueries
from msa_kernels.block_sparse_attention.window import TokenWindow
from msa_kernels.tiles import padded


@dataclass(slots=True)
class Sizes:
    """Hold the sizes of a call, and the powers of two that hold them."""

    M: int
    """KV heads."""
    K: int
    """Slots of a row."""
    G: int
    """Query heads of a KV head."""
    D: int
    """Head dim, in channels."""
    B: int
    """Tokens of a block."""
    index_dim: int
    """Index head dim, in channels; 0 without an index branch."""
    element_bytes: int
    """Bytes of one value of the inputs."""

    @property
    def kv_block_bytes(self) -> int:
        """Return the size of the partial output of one (row, slot) pair, in bytes."""
        return self.G * self.D * self.element_bytes

    @property
    def are_padded(self) -> bool:
        """Tell whether some tile is larger than what it holds, so that kernels mask it."""
        dims = (self.D, self.B, self.index_dim) if self.index_dim else (self.D, self.B)
        return any(padded(size) != size for size in dims) or triton.next_power_of_2(self.G) != self.G

    @property
    def shape(self) -> dict[str, int]:
        """Return constants of the kernels that say how large tiles are, and how much of them is used."""
        return {
            "G": self.G,
            "D": self.D,
            "GP": triton.next_power_of_2(self.G),
            "DP": padded(self.D),
        }

    def config(
        self, table: tuple[configs.TileConfig, ...], *, index: bool = False, split: bool = False
    ) -> configs.TileConfig:
        """Pick tile sizes, which `configs.why_not` has found to exist; split: blocks may be cut."""
        block = padded(1 if split else self.B)
        config = configs.pick(table, padded(self.index_dim if index else self.D), block, self.element_bytes)
        assert config is not None, f"no configuration for {self}"
        return config


def sizes_of(queries: SparseQueries, pool: BlockPool, block_table: Tensor) -> Sizes:
    """Read the sizes of a call off its tensors."""
    _, M, G, D = queries.q.shape
    return Sizes(
        M=M,
        K=block_table.shape[2],
        G=G,
        D=D,
        B=pool.kv.shape[2],
        index_dim=0 if queries.q_index is None else queries.q_index.shape[-1],
        element_bytes=queries.q.element_size(),
    )


@dataclass(slots=True)
class Portion:
    """Hold consecutive queries with their schedule over the pool."""

    queries: SparseQueries
    """The queries of this portion, all tensors contiguous."""
    pool: BlockPool
    """The whole pool, contiguous."""
    sizes: Sizes
    """Sizes of the call."""
    block_table: Tensor
    """[T, M, K] int64 of these queries, contiguous."""
    schedule: Schedule
    """Work of this portion."""

    @property
    def num_pairs(self) -> int:
        """Count (row, slot) pairs, used or not."""
        return self.schedule.order.numel()

    @property
    def visibility(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return position, window start and sink stop; without a window the last two are placeholders."""
        position, window = self.queries.position, self.queries.window
        return (
            (position, position, position) if window is None else (position, window.start, window.sink_stop)
        )

    def work(self, items: Items) -> tuple[Tensor, ...]:
        """Return arguments that describe items to a kernel."""
        return self.schedule.order, items.physical_block, items.begin, items.stop, items.num_items

    def constants(self, *, masked: bool) -> dict[str, Any]:
        """Return constants that all kernels over items share."""
        windowed = self.queries.window is not None
        sizes = self.sizes
        return {
            # read for masks alone: without them the same kernel serves any number of heads
            "M": sizes.M if masked else 1,
            "K": sizes.K,
            "B": sizes.B,
            "BP": padded(sizes.B),
            "MASKED": masked,
            "WINDOWED": masked and windowed,
        }


def portions(
    queries: SparseQueries, pool: BlockPool, block_table: Tensor, max_pairs: int
) -> Iterator[tuple[slice, Portion]]:
    """Yield queries in portions of at most `max_pairs` (row, slot) pairs, or of one query.

    Raises:
        ValueError: on block ids, positions or borders of windows of another dtype than int64.
    """
    check_int64(**{"pool.block": pool.block, "queries.position": queries.position})
    if queries.window is not None:
        borders = {"window.start": queries.window.start, "window.sink_stop": queries.window.sink_stop}
        check_int64(**borders)
    sizes = sizes_of(queries, pool, block_table)
    pool = replace(pool, kv=pool.kv.contiguous(), block=pool.block.contiguous())
    k_index = None if queries.k_index is None else queries.k_index.contiguous()
    # Offsets into tensors of pairs have 32 bits in the kernels.
    most = (2**31 - 1) // max(sizes.G * sizes.D, sizes.B, sizes.index_dim)
    step = queries_per_portion(block_table.shape[0], min(max_pairs, most) // (sizes.M * sizes.K))
    for begin in range(0, block_table.shape[0], step):
        chunk = slice(begin, begin + step)
        window = queries.window
        if window is not None:
            window = TokenWindow(window.start[chunk].contiguous(), window.sink_stop[chunk].contiguous())
        part = replace(
            queries,
            q=queries.q[chunk].contiguous(),
            position=queries.position[chunk].contiguous(),
            q_index=None if queries.q_index is None else queries.q_index[chunk].contiguous(),
            k_index=k_index,
            window=window,
        )
        ids = block_table[chunk].contiguous()
        schedule = build_schedule(ids, pool.block, part.position, window, block_size=sizes.B)
        yield chunk, Portion(part, pool, sizes, ids, schedule)

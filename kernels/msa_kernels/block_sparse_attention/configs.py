"""Tile sizes of the Triton kernels, by head dim, block size and bytes of an element.

A tile of the forward holds ROWS x block_size scores and ROWS x head_dim outputs in registers, K and V of a block
and STAGES tiles of queries in shared memory.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TileConfig:
    """rows: (query, head) rows per step; num_warps; num_stages: tiles on their way at a time; max_dim, max_block,
    max_bytes: the largest padded head dim, padded block size and element size it serves."""

    max_dim: int
    max_block: int
    max_bytes: int
    rows: int
    num_warps: int
    num_stages: int


# The first that serves is taken.
ATTEND = (
    TileConfig(max_dim=128, max_block=128, max_bytes=2, rows=64, num_warps=4, num_stages=2),
    TileConfig(max_dim=128, max_block=256, max_bytes=2, rows=64, num_warps=8, num_stages=2),
    TileConfig(max_dim=256, max_block=128, max_bytes=2, rows=64, num_warps=8, num_stages=2),
    TileConfig(max_dim=128, max_block=128, max_bytes=4, rows=32, num_warps=8, num_stages=2),
)

INDEX_LSE = (
    TileConfig(max_dim=128, max_block=128, max_bytes=2, rows=64, num_warps=4, num_stages=2),
    TileConfig(max_dim=256, max_block=256, max_bytes=2, rows=64, num_warps=8, num_stages=2),
    TileConfig(max_dim=128, max_block=128, max_bytes=4, rows=32, num_warps=8, num_stages=2),
)
ATTEND_BACKWARD = (
    TileConfig(max_dim=128, max_block=128, max_bytes=2, rows=64, num_warps=8, num_stages=1),
    TileConfig(max_dim=128, max_block=128, max_bytes=4, rows=16, num_warps=8, num_stages=1),
)
KL_BACKWARD = (
    TileConfig(max_dim=128, max_block=128, max_bytes=2, rows=64, num_warps=8, num_stages=1),
    TileConfig(max_dim=128, max_block=128, max_bytes=4, rows=32, num_warps=8, num_stages=1),
)
ADD_SPLITS_CHUNK = 4096
ADD_SLOTS_CHUNK = 1024
ADD_SLOTS_TILE = 4096
# Sums over slots: (row, head) rows per program, tiles on their way at a time.
COMBINE_ROWS = 16
COMBINE_STAGES = 4


def why_not(dim: int, block: int, index_dim: int, element_bytes: int) -> str:
    """Why no configuration serves these sizes; empty where there are some. index_dim 0: no index branch."""
    tables = [(ATTEND, dim), (ATTEND_BACKWARD, dim)]
    if index_dim:
        tables += [(INDEX_LSE, index_dim), (KL_BACKWARD, index_dim)]
    for table, width in tables:
        if pick(table, padded(width), padded(block), element_bytes) is None:
            return (
                f"head_dim={width}, block_size={block}, {element_bytes} bytes per element: tiles do not fit"
            )
    return ""


def padded(size: int) -> int:
    """Power of two that holds `size` as a side of a matrix product."""
    return max(16, 1 << (size - 1).bit_length())


def pick(configs: tuple[TileConfig, ...], dim: int, block: int, element_bytes: int) -> TileConfig | None:
    """The first configuration that serves these padded sizes; None where there is none."""
    for config in configs:
        if dim <= config.max_dim and block <= config.max_block and element_bytes <= config.max_bytes:
            return config
    return None

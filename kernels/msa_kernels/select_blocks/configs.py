"""Tile shapes of the scoring kernel. See README.md for what decides them."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class SelectConfig:
    """Tiles and resources of one program."""

    block_m: int
    """Rows, that is (query, group) pairs."""
    tile_n: int
    """Keys per step, a power of two from 16 on: whole blocks, or a part of one if it divides the block.

    A block that it does not divide makes it larger, and so does any block with the log-sum-exp, whose sum
    over the block's tokens needs the block's largest score first.
    """
    num_warps: int
    num_stages: int
    """Key tiles in shared memory."""
    chunk: int = 256
    """Channels of the index head dim per product: the whole of it, but where that would not fit."""
    test_first: bool = False
    """Look whether any row takes the block before the slots are searched; saves work where few do."""


# Hopper, 16-bit inputs, D 128, blocks of 128: two programs share a multiprocessor, so that one reduces and
# inserts while the other multiplies. The first is used; the others are there to be compared with it.
MAIN = (
    SelectConfig(block_m=128, tile_n=128, num_warps=4, num_stages=2),
    SelectConfig(block_m=128, tile_n=128, num_warps=4, num_stages=2, test_first=True),
    SelectConfig(block_m=256, tile_n=128, num_warps=8, num_stages=3, test_first=True),
)
# To be timed against MAIN[0] on a GPU: the same tile in twice as many warps; half blocks, more of which are
# under way at a time; half blocks for twice the rows, which read the keys half as often. All of them leave
# room for a second program on the multiprocessor.
CANDIDATES = (
    SelectConfig(block_m=128, tile_n=128, num_warps=8, num_stages=2),
    SelectConfig(block_m=128, tile_n=64, num_warps=4, num_stages=4),
    SelectConfig(block_m=128, tile_n=64, num_warps=4, num_stages=5),
    SelectConfig(block_m=256, tile_n=64, num_warps=8, num_stages=2),
)
# up to 64 slots per row: half the rows, so that the slots still fit into registers
MANY_SLOTS = SelectConfig(block_m=64, tile_n=128, num_warps=4, num_stages=2, test_first=True)
# D over 128, or blocks of more than 128 keys
LARGE_TILES = SelectConfig(block_m=64, tile_n=128, num_warps=8, num_stages=2, chunk=128, test_first=True)
# fp32 is multiplied without tensor cores, whose tf32 would drop half the digits: for checks, not for speed
FLOAT32 = SelectConfig(block_m=32, tile_n=64, num_warps=8, num_stages=1, chunk=16)
FLOAT32_LSE = SelectConfig(block_m=32, tile_n=64, num_warps=8, num_stages=1, chunk=32)


def select_config(
    *, element_bytes: int, dim: int, block_size: int, slots: int, with_lse: bool
) -> SelectConfig:
    """Configuration for inputs of `element_bytes`, padded index head dim, and slots per row."""
    if element_bytes > 2:
        return _of_whole_blocks(FLOAT32_LSE if with_lse else FLOAT32, block_size)
    if dim > 128 or block_size > 128:
        return _of_whole_blocks(LARGE_TILES, block_size)
    return MAIN[0] if slots <= 16 else MANY_SLOTS


def _of_whole_blocks(config: SelectConfig, block_size: int) -> SelectConfig:
    return replace(config, tile_n=max(config.tile_n, block_size))

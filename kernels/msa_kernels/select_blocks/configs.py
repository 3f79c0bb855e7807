"""Tile shapes of the scoring kernel. See README.md for what decides them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SelectConfig:
    """Tiles and resources of one program."""

    block_m: int
    """Rows, that is (query, group) pairs."""
    tile_n: int
    """Keys per step at most; a block is never divided, so larger blocks make it larger."""
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
        return FLOAT32_LSE if with_lse else FLOAT32
    if dim > 128 or block_size > 128:
        return LARGE_TILES
    return MAIN[0] if slots <= 16 else MANY_SLOTS

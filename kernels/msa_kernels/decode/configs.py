"""Choose tile shapes of the decoding kernels; all of them are bound by memory. See README.md."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Set tiles and resources of the scoring and the attention programs."""

    blocks_per_program: int
    """Blocks that one scoring program reads at most; fewer where the device would not be full otherwise."""
    keys: int
    """Keys per step of the attention at most."""
    num_warps: int
    """Warps of 32 threads per program."""
    num_stages: int
    """Tiles in flight per program."""


# 16-bit inputs, index key tiles of 32 KB. Of a flat cache three lie in shared memory, 102,656 B: two programs
# per multiprocessor. Of pages, whose numbers are loaded first, two do, 69,892 B: three programs. No more
# programs than run at a time, which start up once: 32 blocks each for one sequence of 1M tokens.
MAIN = DecodeConfig(blocks_per_program=64, keys=64, num_warps=4, num_stages=3)
# To be timed on a GPU: many short programs, which end at nearly the same time.
CANDIDATES = (DecodeConfig(blocks_per_program=4, keys=64, num_warps=4, num_stages=3),)
LARGE_TILES = DecodeConfig(blocks_per_program=4, keys=64, num_warps=8, num_stages=1)
# fp32 is multiplied without tensor cores; a whole block of index keys is in registers then
FLOAT32 = DecodeConfig(blocks_per_program=4, keys=32, num_warps=8, num_stages=1)
MAX_FLOAT32_BLOCK_ELEMENTS = 128 * 128


def decode_config(*, element_bytes: int, dim: int, block_size: int) -> DecodeConfig:
    """Choose tiles for a call.

    Args:
        element_bytes: of one value of the inputs.
        dim: the larger of head dim and index head dim, padded to a power of two.
        block_size: tokens per block.
    """
    if element_bytes > 2:
        return FLOAT32
    return LARGE_TILES if dim > 128 or block_size > 128 else MAIN

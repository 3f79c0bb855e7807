"""Choose tile shapes of the scoring kernel. README.md says what decides them."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class SelectConfig:
    """Set tiles and resources of one program."""

    rows: int
    """(query, KV head) rows."""
    keys: int
    """Keys per step, a power of two from 16 on: whole blocks, or a part of one if it divides the block.

    A block that it does not divide makes it larger, and so does any block with the log-sum-exp, whose sum
    over the block's tokens needs the block's largest score first.
    """
    num_warps: int
    """Warps of 32 threads: as many threads as rows keep all slots of a row in one thread."""
    num_stages: int
    """Key tiles in shared memory."""
    chunk: int = 256
    """Channels of the index head dim per product: the whole of it, but where that would not fit."""
    test_first: bool = False
    """Look whether any row takes the block before the slots are searched; saves work where few do."""


# Hopper, 16-bit inputs, D 128, blocks of 128: two programs share a multiprocessor, so that one reduces and
# inserts while the other multiplies. Half a block at a time leaves room for more tiles on their way, which
# are asked for before the insertion: the first is used, the others are there to be compared with it. Blocks
# of other sizes, and the log-sum-exp, which needs a block's scores at once, have WHOLE.
MAIN = (
    SelectConfig(rows=128, keys=64, num_warps=4, num_stages=4),
    SelectConfig(rows=128, keys=128, num_warps=4, num_stages=2, test_first=True),
    SelectConfig(rows=256, keys=128, num_warps=8, num_stages=3, test_first=True),
)
WHOLE = SelectConfig(rows=128, keys=128, num_warps=4, num_stages=2)
# To be timed against MAIN[0] on a GPU: whole blocks, by 4 warps and by 8; one more half on its way; half
# blocks for twice the rows, which read the keys half as often. All of them leave room for a second program
# on the multiprocessor.
CANDIDATES = (
    WHOLE,
    SelectConfig(rows=128, keys=128, num_warps=8, num_stages=2),
    SelectConfig(rows=128, keys=64, num_warps=4, num_stages=5),
    SelectConfig(rows=256, keys=64, num_warps=8, num_stages=2),
)
# 8-bit inputs, half the bytes: three programs share a multiprocessor
FP8 = SelectConfig(rows=128, keys=64, num_warps=4, num_stages=4)
# up to 64 slots per row: half the rows, so that the slots still fit into registers
MANY_SLOTS = SelectConfig(rows=64, keys=128, num_warps=4, num_stages=2, test_first=True)
# D over 128, or blocks of more than 128 keys
LARGE_TILES = SelectConfig(rows=64, keys=128, num_warps=8, num_stages=2, chunk=128, test_first=True)
# fp32 is multiplied without tensor cores, whose tf32 would drop half the digits: for checks, not for speed
FLOAT32 = SelectConfig(rows=32, keys=64, num_warps=8, num_stages=1, chunk=16)
FLOAT32_LSE = SelectConfig(rows=32, keys=64, num_warps=8, num_stages=1, chunk=32)


def select_config(
    *, element_bytes: int, dim: int, block_size: int, slots: int, with_lse: bool
) -> SelectConfig:
    """Choose tiles for a call.

    Args:
        element_bytes: of one value of the inputs.
        dim: index head dim, padded to a power of two.
        block_size: tokens per block.
        slots: top-k per row, padded to a power of two.
        with_lse: whether the log-sum-exp is formed too.
    """
    if element_bytes > 2:
        return _of_whole_blocks(FLOAT32_LSE if with_lse else FLOAT32, block_size)
    if dim > 128 or block_size > 128:
        return _of_whole_blocks(LARGE_TILES, block_size)
    if slots > 16:
        return MANY_SLOTS
    if element_bytes == 1:
        return FP8 if block_size == 128 else WHOLE
    return MAIN[0] if block_size == 128 and not with_lse else WHOLE


def _of_whole_blocks(config: SelectConfig, block_size: int) -> SelectConfig:
    """Widen the tile to a whole block where it is a part of one."""
    return replace(config, keys=max(config.keys, block_size))

"""Choose tile sizes of the Triton kernels, by head dim, block size and bytes of an element.

The forward holds rows x block_size scores and rows x head_dim outputs in registers, K and V of a block and a
few tiles of queries in shared memory. The backward holds two gradients of block_size x head_dim in registers,
half of what there is at 128 x 128, and takes larger blocks in parts, one launch each.
"""

from dataclasses import dataclass

from msa_kernels.tiles import padded


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Set tile sizes for calls up to max_dim, max_block and max_bytes."""

    max_dim: int
    """Largest head dim, rounded up to a power of two, in channels."""
    max_block: int
    """Largest block size, rounded up to a power of two, in tokens."""
    max_bytes: int
    """Largest element, in bytes."""
    rows: int
    """(query, query head) rows per step."""
    num_warps: int
    """Warps of 32 threads per program."""
    num_stages: int
    """Tiles on their way at a time."""
    separate: bool = False
    """Gradients of K and V in launches of their own, which forms the probabilities twice."""


# In every table the first that serves is taken. The forward fetches ahead by itself: one stage.
ATTEND = (
    TileConfig(128, 128, 2, rows=64, num_warps=4, num_stages=1),
    TileConfig(128, 256, 2, rows=64, num_warps=8, num_stages=1),
    TileConfig(256, 128, 2, rows=64, num_warps=8, num_stages=1),
    TileConfig(128, 128, 4, rows=16, num_warps=8, num_stages=1),
    TileConfig(256, 32, 4, rows=16, num_warps=8, num_stages=1),
)
# Of the kernel that takes queries first: rows of a tile of queries (of 16 heads, 4 queries). Two programs
# share a multiprocessor: loads are asked for at the end of a step and awaited at the start of the next.
#
# None for fp32: without tensor cores both operands of a product lie in registers, and spill.
UNION = (TileConfig(128, 128, 2, rows=64, num_warps=4, num_stages=2),)
# To be timed on a GPU: 8 queries read each block of theirs once, by one program at a time.
UNION_CANDIDATES = (TileConfig(128, 128, 2, rows=128, num_warps=8, num_stages=2),)
# Keys of a step, and queries of a tile at most
UNION_KEYS = 64
UNION_QUERIES = 16
# It is taken where a tile's queries together read at most this many times the blocks that each reads. By
# arithmetic, not measured: a step of 64 keys is 2.1 MFLOP and 32 KiB from the L2 cache, whose 5.5 TB/s allow
# 350 TFLOP/s, of which the share is useful; the block-first kernels, which memory binds, get about 215. 4
# queries of M3 read 1.4 times as many (22 of 64). 0: never.
UNION_SHARE = 1.6
INDEX_LSE = (
    TileConfig(128, 128, 2, rows=64, num_warps=4, num_stages=2),
    TileConfig(256, 256, 2, rows=64, num_warps=8, num_stages=2),
    TileConfig(256, 128, 4, rows=16, num_warps=8, num_stages=1),
)
# Larger blocks are taken in parts of max_block. 8 warps: two gradients of 128 x 128 in fp32 are 32,768
# values, all registers of 4 warps (128 threads of 255) and half of those of 8.
#
# 64 rows with one stage: half as many waits for rows, and products twice as wide as 32 rows have. A second
# stage would hide no load of this loop, and does not fit beside them.
ATTEND_BACKWARD = (
    TileConfig(128, 128, 2, rows=64, num_warps=8, num_stages=1),
    TileConfig(256, 128, 2, rows=32, num_warps=8, num_stages=2, separate=True),
    TileConfig(128, 32, 4, rows=16, num_warps=8, num_stages=1),
    TileConfig(256, 16, 4, rows=16, num_warps=8, num_stages=1),
)
# Whatever else takes registers leaves too few for 64 rows: a second softmax, windows, sizes that are no
# powers of two, a block in parts. Then:
ATTEND_BACKWARD_NARROW = (
    TileConfig(128, 128, 2, rows=32, num_warps=8, num_stages=2),
    *ATTEND_BACKWARD[1:],
)
# To be timed on a GPU in front of ATTEND_BACKWARD: fewer registers, more instructions.
ATTEND_BACKWARD_CANDIDATES = ATTEND_BACKWARD_NARROW[:1]
KL_BACKWARD = (
    TileConfig(128, 128, 2, rows=64, num_warps=8, num_stages=1),
    TileConfig(256, 64, 2, rows=32, num_warps=8, num_stages=2),
    TileConfig(256, 16, 4, rows=16, num_warps=8, num_stages=1),
)
KL_BACKWARD_NARROW = (TileConfig(128, 128, 2, rows=32, num_warps=8, num_stages=1), *KL_BACKWARD[1:])
KL_BACKWARD_CANDIDATES = KL_BACKWARD_NARROW[:1]
# Sums over parts and slots: values per program, (row, query head) rows per program, tiles on their way at a
# time.
ADD_SPLITS_CHUNK = 4096
ADD_SLOTS_CHUNK = 1024
ADD_SLOTS_TILE = 4096
COMBINE_ROWS = 16
# Values per program of the sum of dout * out: 32 of each per thread, read 16 bytes at a time.
DELTA_VALUES = 4096
COMBINE_STAGES = 4


def why_not(dim: int, block: int, index_dim: int, heads: int, element_bytes: int) -> str | None:
    """Return why no configuration serves these sizes; None where there are some.

    Args:
        dim, block, index_dim: head dim, tokens per block, index head dim (0: no index branch).
        heads: query heads of a KV head.
        element_bytes: of one value.
    """
    # the backward takes a block in parts of any length, so that it fits whatever its size
    tables = [(ATTEND, "head_dim", dim, block), (ATTEND_BACKWARD, "head_dim", dim, 1)]
    if index_dim:
        tables += [
            (INDEX_LSE, "index_head_dim", index_dim, block),
            (KL_BACKWARD, "index_head_dim", index_dim, 1),
        ]
    for table, name, width, length in tables:
        config = pick(table, padded(width), padded(length), element_bytes)
        if config is None:
            return (
                f"{name}={width}, block_size={block} at {element_bytes} bytes: tiles do not fit a processor"
            )
        if name == "head_dim" and heads > config.rows:
            return f"heads per group={heads}: must be at most {config.rows} at {element_bytes} bytes"
    return None


def pick(configs: tuple[TileConfig, ...], dim: int, block: int, element_bytes: int) -> TileConfig | None:
    """Return the first configuration that serves these padded sizes; None where there is none."""
    for config in configs:
        if dim <= config.max_dim and block <= config.max_block and element_bytes <= config.max_bytes:
            return config
    return None

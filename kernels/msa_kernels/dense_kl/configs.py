"""Tile sizes of the Triton kernels, by head dims and bytes of an element. See README.md."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """Tiles for head dims up to max_dim, rounded up to a power of two, and elements up to max_bytes.

    rows: queries, keys: keys of one score tile. num_stages: tiles on their way at a time.
    """

    max_dim: int
    max_bytes: int
    rows: int
    keys: int
    num_warps: int
    num_stages: int


# In every table the first that serves is taken.
LSE = (
    DenseConfig(128, 2, rows=128, keys=128, num_warps=8, num_stages=3),
    DenseConfig(256, 2, rows=128, keys=64, num_warps=8, num_stages=2),
    DenseConfig(256, 4, rows=16, keys=16, num_warps=4, num_stages=1),
)
# Of the differences, and of both gradients, which read their tiles
DIFFERENCE = (
    DenseConfig(128, 2, rows=64, keys=128, num_warps=8, num_stages=2),
    DenseConfig(256, 2, rows=64, keys=64, num_warps=8, num_stages=2),
    # fp32 is multiplied without tensor cores
    DenseConfig(256, 4, rows=16, keys=16, num_warps=4, num_stages=1),
)


def pick(table: tuple[DenseConfig, ...], dim: int, element_bytes: int) -> DenseConfig | None:
    """The first configuration that serves this padded head dim; None where there is none."""
    for config in table:
        if dim <= config.max_dim and element_bytes <= config.max_bytes:
            return config
    return None

"""Choose tile sizes of the Triton kernels, by head dims and bytes of an element. See README.md."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """Set tiles for head dims up to max_dim and elements up to max_bytes."""

    max_dim: int
    """Largest head dim, rounded up to a power of two, in channels."""
    max_bytes: int
    """Largest element, in bytes."""
    rows: int
    """Queries of one score tile."""
    keys: int
    """Keys of one score tile."""
    num_warps: int
    """Warps of 32 threads per program."""
    num_stages: int
    """Tiles on their way at a time."""


# In every table the first that serves is taken.
LSE = (
    DenseConfig(128, 2, rows=128, keys=128, num_warps=8, num_stages=3),
    DenseConfig(256, 2, rows=128, keys=64, num_warps=8, num_stages=2),
    DenseConfig(256, 4, rows=16, keys=16, num_warps=4, num_stages=1),
)
# Of the differences, and of both gradients, which read their tiles. With two stages a head's queries would be
# waited for at the top of the loop; three fit beside the one program that the registers allow.
DIFFERENCE = (
    DenseConfig(128, 2, rows=64, keys=128, num_warps=8, num_stages=3),
    DenseConfig(256, 2, rows=64, keys=64, num_warps=8, num_stages=2),
    # fp32 is multiplied without tensor cores
    DenseConfig(256, 4, rows=16, keys=16, num_warps=4, num_stages=1),
)
# Of the queries' gradient, at most: with two a second program fits on the multiprocessor.
QUERY_GRADIENT_STAGES = 2


def pick(table: tuple[DenseConfig, ...], dim: int, element_bytes: int) -> DenseConfig | None:
    """Return the first configuration that serves this padded head dim; None where there is none."""
    for config in table:
        if dim <= config.max_dim and element_bytes <= config.max_bytes:
            return config
    return None

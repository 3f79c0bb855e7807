"""Sizes of tiles of the Triton kernels, for their configurations and launches."""


def padded(size: int) -> int:
    """Power of two that holds `size` as a side of a matrix product."""
    return max(16, 1 << (size - 1).bit_length())

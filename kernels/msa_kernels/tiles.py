"""Round sizes up to tiles of the Triton kernels, for their configurations and launches."""


def padded(size: int) -> int:
    """Return the power of two that holds `size` as a side of a matrix product.

    Example: 5 becomes 16, the smallest side of a product; 96 becomes 128.
    """
    return max(16, 1 << (size - 1).bit_length())

"""What a layer costs: bytes and times of its transfers and kernels."""

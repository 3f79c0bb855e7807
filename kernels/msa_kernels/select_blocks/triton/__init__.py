"""Select blocks by Triton kernels: the kernels and their launch."""

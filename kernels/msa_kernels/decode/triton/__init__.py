"""Triton kernels of decoding and their launches."""

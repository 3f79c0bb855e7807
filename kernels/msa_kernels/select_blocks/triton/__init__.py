"""Triton kernels of block selection and their launches."""

"""Decode by Triton kernels: the kernels and their launches."""

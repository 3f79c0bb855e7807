"""Triton kernels of the KL loss over all keys and their launches."""

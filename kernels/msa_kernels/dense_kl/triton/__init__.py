"""Form the KL loss over all keys by Triton kernels: the kernels and their launches."""

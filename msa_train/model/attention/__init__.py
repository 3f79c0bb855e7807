"""Attention of the model: full, sliding window, MSA."""

"""Distributed long-context training of MiniMax-Sparse-Attention mixture-of-experts models."""

__version__ = "0.1.0"

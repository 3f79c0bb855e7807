"""Optimizer, gradient buffers, learning rates."""

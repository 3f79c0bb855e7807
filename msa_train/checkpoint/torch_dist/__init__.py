"""Megatron's torch_dist files: written in the background, read without executing anything."""

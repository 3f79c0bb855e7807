"""Attend in the model: full, sliding window, MSA."""

"""Compute the parts of a transformer layer besides attention."""

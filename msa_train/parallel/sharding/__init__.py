"""Lay out the tokens of a pack over context-parallel ranks, and move them."""

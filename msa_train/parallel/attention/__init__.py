"""Attend over a sequence that is split over context-parallel ranks."""

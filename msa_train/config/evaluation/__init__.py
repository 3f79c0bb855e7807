"""Describe evaluations and the rules for them."""

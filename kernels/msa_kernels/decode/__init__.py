"""Attention of one new token per sequence over a cache, through block selection."""

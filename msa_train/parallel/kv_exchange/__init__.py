"""Decide which KV blocks travel between ranks, and bring them."""

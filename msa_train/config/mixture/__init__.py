"""Describe mixtures of data: named sources, weights, and classes of documents by their length."""

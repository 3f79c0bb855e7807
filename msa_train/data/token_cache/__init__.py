"""Tokenized corpora on the disk."""

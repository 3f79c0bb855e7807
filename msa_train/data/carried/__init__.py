"""Carry the place in the data by document, where the length of packs changes during a run."""

"""Collectives and messages between ranks, watched and counted."""

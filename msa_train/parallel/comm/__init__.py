"""Run collectives and messages between ranks, watched and counted."""

"""Attend exactly to selected key/value blocks, with the KL loss that trains the selection."""

"""Form the KL loss of the index branch over selected blocks."""

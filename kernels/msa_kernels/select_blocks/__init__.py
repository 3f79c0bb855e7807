"""Top-k selection of key blocks by the index branch."""

"""Select key blocks for every query: top-k by the index branch."""

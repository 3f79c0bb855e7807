"""Begin exchanges before the selection is complete, so that they travel while blocks are scored."""

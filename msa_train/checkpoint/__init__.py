"""Writing, finding, checking and reading checkpoints. Knows no training."""

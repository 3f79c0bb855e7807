"""Finding and reading text files."""

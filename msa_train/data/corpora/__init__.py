"""Find and read text files."""

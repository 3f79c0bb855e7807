"""Hold what samples are written with: wordings, word lists, running text."""

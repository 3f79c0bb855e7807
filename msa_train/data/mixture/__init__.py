"""Mix sources of documents, and classes of their length, in an exact order."""

"""Keep tokenized corpora on the disk."""

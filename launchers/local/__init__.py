"""One machine: its run directory, its worker processes, what they die of."""

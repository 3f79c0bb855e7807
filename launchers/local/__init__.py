"""Start and watch workers on one machine: checks, run directory, processes, and what they die of."""

"""Process groups, sequence layout, exchange plans and collectives of context parallelism."""

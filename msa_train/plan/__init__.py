"""Plan runs before any GPU is asked for: memory and time of every stage, and what fits."""

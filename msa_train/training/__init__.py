"""Train: engines, optimizers, the loop, bad steps, metrics. Begin to read in `worker`, then `trainer`."""

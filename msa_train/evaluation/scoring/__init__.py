"""Run samples and held-out documents through the training forward, and count what comes out."""

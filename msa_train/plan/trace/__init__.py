"""Run the trainer's own step of one rank on tensors without memory, and count what it would hold."""

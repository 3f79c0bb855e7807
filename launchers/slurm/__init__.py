"""Run on many machines through Slurm: batch scripts, checks of nodes, sweeps, status."""

"""Many machines: batch scripts, checks of nodes, sweeps."""

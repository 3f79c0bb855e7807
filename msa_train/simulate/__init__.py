"""Step time of MSA and full-attention layers on any cluster, from real exchange plans and measured kernel rates."""

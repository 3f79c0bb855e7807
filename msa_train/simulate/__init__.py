"""Predict the time of attention layers on any cluster, from real exchange plans and measured kernel rates."""

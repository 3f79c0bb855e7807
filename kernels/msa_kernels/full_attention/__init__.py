"""Attend to all keys in parts that are merged by log-sum-exp."""

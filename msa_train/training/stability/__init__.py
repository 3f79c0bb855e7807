"""Deal with steps that must not be taken: skip them, roll the run back, or end it."""

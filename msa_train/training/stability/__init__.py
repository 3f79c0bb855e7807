"""Steps that must not be taken: skipped, rolled back, or the end of the run."""

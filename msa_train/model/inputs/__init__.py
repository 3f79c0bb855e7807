"""Plan and hold what one pack brings to the model on this rank."""

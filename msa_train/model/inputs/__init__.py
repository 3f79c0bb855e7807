"""What one pack brings to the model on this rank: its shard and the tensors of its attention."""

"""Block selections: recorded in training, or drawn."""

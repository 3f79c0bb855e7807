"""Work out what the stages of a run mean: their steps, and what the processes of each are laid out as."""

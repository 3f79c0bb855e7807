"""Parts of a transformer layer besides attention."""

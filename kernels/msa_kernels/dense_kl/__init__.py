"""Form the KL loss of the index branch over all causal tokens, for the warm-up with full attention."""

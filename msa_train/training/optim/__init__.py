"""Update parameters for engine=torch: gradient buffers, AdamW and Muon."""

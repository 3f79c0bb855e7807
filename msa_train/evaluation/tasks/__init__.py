"""Generate samples of long-context tasks: pure functions of seed, length and tokenizer."""

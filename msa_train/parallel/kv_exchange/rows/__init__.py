"""Turn wishes for KV blocks, a bit each, into lists of the rows of messages."""

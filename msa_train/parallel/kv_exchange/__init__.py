"""Which KV blocks travel between ranks, and by what transport."""

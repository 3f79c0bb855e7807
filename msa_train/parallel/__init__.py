"""Split a sequence over ranks: process groups, layout, exchange of KV blocks, attention."""

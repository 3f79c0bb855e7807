"""Which tokens lie on which context-parallel rank, and moving them."""

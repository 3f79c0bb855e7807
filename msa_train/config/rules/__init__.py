"""Check settings, each failure with the one line that says so."""

"""What settings must be, and the one line that says so."""

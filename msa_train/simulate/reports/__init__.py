"""Studies as text, tables and comparisons with measurements."""

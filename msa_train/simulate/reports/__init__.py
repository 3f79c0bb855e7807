"""Show studies as text, tables and comparisons with measurements."""

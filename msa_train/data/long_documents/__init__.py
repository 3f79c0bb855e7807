"""Make long documents honestly: of what belongs together, with a record of how."""

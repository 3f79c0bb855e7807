"""Hold what every command shares: exit codes, help, printing."""

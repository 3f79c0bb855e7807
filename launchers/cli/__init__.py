"""What every command shares: exit codes, help, printing."""

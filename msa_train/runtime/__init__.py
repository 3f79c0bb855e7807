"""Keep what a process owes its run directory: whole files, one owner, last words. Standard library only."""

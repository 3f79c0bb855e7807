"""Hold the commands, the reading of configuration files and the worker processes; alone in knowing Hydra."""

"""Turn YAML files and overrides into one checked configuration, by Hydra."""

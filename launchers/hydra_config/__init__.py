"""From YAML files and overrides to one checked configuration, by Hydra."""

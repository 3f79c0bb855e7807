"""Command line, configuration files and worker processes. The only package that knows Hydra."""

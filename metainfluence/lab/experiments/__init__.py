"""Experiments on real tasks, each run by `metainfluence reproduce` from one TOML file."""

"""Experiments on real tasks; `metainfluence reproduce` runs each from one TOML file."""

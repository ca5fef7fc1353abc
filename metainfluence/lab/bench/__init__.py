"""What `metainfluence bench` measures: a module or a package for each suite."""

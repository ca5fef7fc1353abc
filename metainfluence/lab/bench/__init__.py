"""What `metainfluence bench` measures: one module or package per suite."""

"""The same quantities by other libraries, timed against ours at equal error."""

"""Files that are on disk as a whole or not at all."""

from metainfluence._disk import replacing, write_atomically

__all__ = ["replacing", "write_atomically"]

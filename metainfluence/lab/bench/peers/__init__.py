"""The same numbers by other libraries, timed beside ours at the same error."""

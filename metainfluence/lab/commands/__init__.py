"""The command line's usual workflow: train, score, edit, evaluate, report."""

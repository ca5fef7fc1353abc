"""The command line's working day: train, score, edit, evaluate, report."""

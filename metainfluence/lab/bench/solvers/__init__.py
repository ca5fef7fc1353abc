"""Solvers, curvatures and dampings measured against exact answers."""

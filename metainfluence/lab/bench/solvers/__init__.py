"""Solvers, curvatures and dampings compared with exact answers."""

"""Plots, tables and pages, and what commands print."""

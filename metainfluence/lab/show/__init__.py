"""Plots, tables, pages, and what commands print."""

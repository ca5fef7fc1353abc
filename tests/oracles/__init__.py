"""Brute-force references, written from the mathematics and never from the library's code."""

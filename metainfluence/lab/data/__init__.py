"""Labelled images and curves, few-shot tasks of them, and these as sources for scoring."""

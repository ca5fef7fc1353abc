"""Labelled images and curves, few-shot tasks from these, and sources for scoring."""

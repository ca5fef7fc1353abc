"""Flax models, learners, meta-training, checkpoints, and run times with the compile time kept apart."""

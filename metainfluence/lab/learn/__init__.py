"""Flax models, learners, meta-training, checkpoints, and run times without compile times."""

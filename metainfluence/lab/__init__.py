"""The lab: few-shot data, flax models, meta-training, experiments and the command line.

Needs the extra `lab` (`pip install "metainfluence[lab]"`); the core never imports it.
"""

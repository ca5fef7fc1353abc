"""The lab: few-shot data, flax models, meta-training, experiments and the command line.

Its wings, of which each imports from those before it: `data`, `learn`, `show`, `experiments`, `bench`, `commands`.

Needs the extra `lab` (`pip install "metainfluence[lab]"`); the core never imports it.
"""

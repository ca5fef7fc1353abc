"""The lab: few-shot data, flax models, meta-training, experiments and the command line.

Each subpackage imports only from those before it: `data`, `learn`, `show`, `experiments`, `bench`, `commands`.

Needs the extra `lab` (`pip install "metainfluence[lab]"`); the core never imports it.
"""

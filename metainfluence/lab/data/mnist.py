"""MNIST from TFDS: handwritten digits, 28 × 28 (LeCun et al., 1998)."""

import os

import numpy as np

from metainfluence.lab.data import _prepared as prepared
from metainfluence.lab.data.datasets import Dataset, by_example


def dataset(*, size: int | None = None, root: str | os.PathLike[str] | None = None) -> Dataset:
    """All prepared splits, as two halves that both hold all ten classes and share no example.

    Raises:
      FileNotFoundError: the dataset is not prepared; the message gives the command that prepares it.
    """
    source = prepared.builder("mnist", root)
    parts = [prepared.columns(source, split, ("label",), size=size, mode="L") for split in sorted(source.info.splits)]
    labels = np.concatenate([table["label"] for _, table in parts])
    images = np.concatenate([images for images, _ in parts])
    return Dataset("mnist", images, labels, tuple(map(str, range(10))), by_example(labels))

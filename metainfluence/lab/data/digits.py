"""scikit-learn's digits: 1,797 real 8x8 images that come with the package, so no download is needed."""

import os
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from metainfluence.lab.data.datasets import Dataset, by_example, resized


class Digits(NamedTuple):
    """Images with brightness in [0, 1], their classes, and two disjoint pools of example ids."""

    images: np.ndarray  # float [1797, 8, 8]
    labels: np.ndarray  # int [1797]
    train_pool: np.ndarray  # int [M]: ids for the meta-training tasks
    held_out_pool: np.ndarray  # int [1797 - M]: ids for the held-out tasks


def load(*, held_out_share: float = 0.5, seed: int = 0) -> Digits:
    """Load the digits and split the examples of every class into the two pools.

    Args:
      held_out_share: share of every class's examples, between 0 and 1.
      seed: seed of the split.
    """
    data = load_digits()
    pools = by_example(data.target, test_share=held_out_share, seed=seed)
    return Digits(data.images / data.images.max(), data.target, pools["train"], pools["test"])


def dataset(*, size: int | None = None, root: str | os.PathLike[str] | None = None) -> Dataset:
    """The digits as a `Dataset` of 8 × 8 images, or of another size; the pools are disjoint halves.

    Raises:
      ValueError: `root` is given, though the digits come with scikit-learn.
    """
    if root is not None:
        raise ValueError(f"root: expected None, since the digits come with scikit-learn, got {os.fspath(root)!r}")
    read = load()
    pools = {"train": read.train_pool, "test": read.held_out_pool}
    images = resized(read.images.astype(np.float32), size)
    return Dataset("digits", images, read.labels, tuple(map(str, range(10))), pools)

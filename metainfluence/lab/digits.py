"""scikit-learn's digits: 1,797 real 8x8 images that come with the package, so nothing is downloaded."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Digits(NamedTuple):
    """Images with brightness in [0, 1], their classes, and two pools of example ids that share none."""

    images: np.ndarray  # float [1797, 8, 8]
    labels: np.ndarray  # int [1797]
    train_pool: np.ndarray  # int [M]: ids for the meta-training tasks
    held_out_pool: np.ndarray  # int [1797 - M]: ids for the held-out tasks


def load(*, held_out_share: float = 0.5, seed: int = 0) -> Digits:
    """Load the digits and split the examples of every class into the two pools.

    Args:
      held_out_share: of every class's examples, between 0 and 1.
      seed: of the split.
    """
    data = load_digits()
    train, held_out = train_test_split(
        np.arange(len(data.target)), test_size=held_out_share, stratify=data.target, random_state=seed
    )
    return Digits(data.images / data.images.max(), data.target, np.sort(train), np.sort(held_out))

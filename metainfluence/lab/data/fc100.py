"""FC100: CIFAR-100 split by superclass, so that training and test classes have little in common.

Oreshkin et al., TADAM, NeurIPS 2018.
"""

import os

import numpy as np

from metainfluence.lab.data.cifar_fs import CLASS_NAMES, cifar100
from metainfluence.lab.data.datasets import Dataset, check_pools

SUPERCLASSES = (
    "aquatic_mammals",
    "fish",
    "flowers",
    "food_containers",
    "fruit_and_vegetables",
    "household_electrical_devices",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores",
    "medium_mammals",
    "non-insect_invertebrates",
    "people",
    "reptiles",
    "small_mammals",
    "trees",
    "vehicles_1",
    "vehicles_2",
)
SPLITS = {
    "train": (1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19),
    "val": (8, 11, 13, 16),
    "test": (0, 7, 12, 14),
}


def dataset(*, size: int | None = None, root: str | os.PathLike[str] | None = None) -> Dataset:
    """FC100 with the published pools: 60 classes of 12 superclasses to train on, 20 of 4 each to validate and test."""
    images, labels, superclasses = cifar100(size, root)
    pools = {split: np.flatnonzero(np.isin(superclasses, chosen)) for split, chosen in SPLITS.items()}
    check_pools(superclasses, pools, SUPERCLASSES, "superclasses")
    check_pools(labels, pools, CLASS_NAMES)
    return Dataset("fc100", images, labels, CLASS_NAMES, pools)

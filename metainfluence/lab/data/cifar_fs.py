"""CIFAR-FS: CIFAR-100 split by class into 64, 16 and 20 (Bertinetto et al., ICLR 2019)."""

import os

import numpy as np

from metainfluence.lab.data import _prepared as prepared
from metainfluence.lab.data.datasets import Dataset, by_class

# fmt: off
# The order of CIFAR-100's labels, which is alphabetical.
CLASS_NAMES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum",
    "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
    "woman", "worm",
)
VAL = (
    "beaver", "beetle", "butterfly", "camel", "cattle", "crab", "crocodile", "flatfish", "lamp", "maple_tree",
    "motorcycle", "otter", "sea", "shark", "television", "tractor",
)
TEST = (
    "baby", "bed", "bicycle", "chimpanzee", "fox", "leopard", "man", "pickup_truck", "plain", "poppy", "rocket",
    "rose", "snail", "sweet_pepper", "table", "telephone", "wardrobe", "whale", "woman", "worm",
)
# fmt: on
TRAIN = tuple(name for name in CLASS_NAMES if name not in VAL + TEST)


def cifar100(size: int | None, root: str | os.PathLike[str] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All 60,000 images of CIFAR-100, its train and test splits together.

    Returns:
      images: float32 [N, size, size, 3].
      labels: int [N], indices of `CLASS_NAMES`.
      superclasses: int [N], indices of CIFAR-100's 20 superclasses in alphabetical order.

    Raises:
      FileNotFoundError: the dataset is not prepared; the message gives the command that prepares it.
      ValueError: class names that are not CIFAR-100's.
    """
    source = prepared.builder("cifar100", root)
    names = tuple(source.info.features["label"].names)
    # A dataset prepared without its file of names numbers the classes.
    if names not in (CLASS_NAMES, tuple(map(str, range(100)))):
        raise ValueError(f"cifar100: expected the class names of CIFAR-100, got {', '.join(names[:5])}, …")
    keys = ("label", "coarse_label")
    parts = [prepared.columns(source, split, keys, size=size, mode="RGB") for split in sorted(source.info.splits)]
    labels, superclasses = (np.concatenate([table[key] for _, table in parts]) for key in keys)
    return np.concatenate([images for images, _ in parts]), labels, superclasses


def dataset(*, size: int | None = None, root: str | os.PathLike[str] | None = None) -> Dataset:
    """CIFAR-FS with the published pools "train", "val" and "test", which share no class."""
    images, labels, _ = cifar100(size, root)
    pools = by_class(labels, CLASS_NAMES, {"train": TRAIN, "val": VAL, "test": TEST})
    return Dataset("cifar_fs", images, labels, CLASS_NAMES, pools)

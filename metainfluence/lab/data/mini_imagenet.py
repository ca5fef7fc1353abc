"""mini-ImageNet: 100 classes of 84 × 84 images (Vinyals et al., 2016; the split of Ravi and Larochelle, 2017)."""

import os

from metainfluence.lab.data.datasets import Dataset, image_folder

VARIABLE = "METAINFLUENCE_MINI_IMAGENET"
NUM_CLASSES = {"train": 64, "val": 16, "test": 20}
SIZE = 84


def dataset(*, size: int | None = None, root: str | os.PathLike[str] | None = None) -> Dataset:
    """Reads a folder with train, val and test, of 64, 16 and 20 classes.

    Args:
      size: height and width; None for 84.
      root: the folder; None for the value of METAINFLUENCE_MINI_IMAGENET.

    Raises:
      FileNotFoundError: the folder does not exist, or the variable is not set.
      ValueError: wrong splits or numbers of classes, or whatever `image_folder` refuses.
    """
    folder = root or os.environ.get(VARIABLE)
    if not folder:
        raise FileNotFoundError(
            f"mini-ImageNet: expected {VARIABLE} to name its folder, laid out as train/<class>/<image>.jpg, val/… and "
            f"test/…, got no value; set it, as in: export {VARIABLE}=path/to/mini-imagenet"
        )
    read = image_folder(folder, size=SIZE if size is None else size, name="mini_imagenet")
    found = {split: len(set(read.labels[ids].tolist())) for split, ids in read.pools.items()}
    if found != NUM_CLASSES:
        raise ValueError(f"{folder}: expected the classes of mini-ImageNet's splits, {NUM_CLASSES}, got {found}")
    return read

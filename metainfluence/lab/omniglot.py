"""Omniglot from prepared TFDS files, read without TensorFlow."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 28


def load(split: str = "small1") -> tuple[np.ndarray, np.ndarray]:
    """Read a split of the prepared dataset; `TFDS_DATA_DIR` says where it lies, `~/tensorflow_datasets` by default.

    Args:
        split: a TFDS split: "train", "test", "small1" or "small2".

    Returns:
        images: float [N, 28, 28], ink 1 on 0, averaged down from 105 × 105.
        labels: int [N], the characters.

    Raises:
        FileNotFoundError: the dataset is not prepared; the message has the command that does it.
    """
    import tensorflow_datasets as tfds

    root = Path(os.environ.get("TFDS_DATA_DIR", Path.home() / "tensorflow_datasets"))
    prepared = sorted(root.glob("omniglot/*/dataset_info.json"))
    if not prepared:
        raise FileNotFoundError(
            f"Omniglot is not prepared in {root}, where TFDS_DATA_DIR (or its default) points. Prepare it once: "
            "pip install 'metainfluence[data]' && tfds build omniglot --file_format=array_record"
        )
    source = tfds.builder_from_directory(prepared[-1].parent).as_data_source(split=split)
    images, labels = [], []
    for example in source:
        picture = Image.fromarray(example["image"]).convert("L").resize((SIZE, SIZE), Image.Resampling.BOX)
        images.append(1.0 - np.asarray(picture) / 255.0)
        labels.append(example["label"])
    return np.stack(images), np.asarray(labels)

"""How far apart two vectors are: relative error, angle, ranks."""

from typing import Any

import jax
import numpy as np
from scipy.stats import rankdata


def flat(tree: Any) -> np.ndarray:
    """All numbers of a pytree as one vector."""
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    """Cosine of the angle between two vectors; 0 if one of them is 0."""
    scale = np.linalg.norm(left) * np.linalg.norm(right)
    return float(left @ right / scale) if scale > 0 else 0.0


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Rank correlation; NaN if a value is NaN."""
    if not (np.all(np.isfinite(left)) and np.all(np.isfinite(right))):
        return float("nan")
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (left, right)]
    return cosine(*ranks)

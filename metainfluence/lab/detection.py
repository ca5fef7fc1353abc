"""How well scores find damaged data: the share found against the share inspected, most harmful first."""

import numpy as np
from sklearn.metrics import roc_auc_score


def detection_curve(scores: np.ndarray, damaged: np.ndarray) -> np.ndarray:
    """The share of damaged data among the n most harmful, for n = 0 … N.

    Args:
      scores: [N], the more negative the more harmful; ties keep the order of the data.
      damaged: bool [N], the ground truth.

    Returns:
      [N + 1], from 0 to 1.
    """
    found = np.cumsum(np.asarray(damaged)[np.argsort(scores, kind="stable")])
    return np.concatenate([[0], found]) / max(found[-1], 1)


def found_at(scores: np.ndarray, damaged: np.ndarray, share: float) -> float:
    """The share of damaged data found when the given share of all data is inspected."""
    return float(detection_curve(scores, damaged)[round(share * len(scores))])


def roc_auc(scores: np.ndarray, damaged: np.ndarray) -> float:
    """Probability that a damaged datum scores as more harmful than an undamaged one (ties count half)."""
    return float(roc_auc_score(damaged, -np.asarray(scores)))

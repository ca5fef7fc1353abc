"""How well scores find damaged data: the share found against the share inspected, most harmful first."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from metainfluence.evaluation._bootstrap import Estimate, bootstrap, flags, numbers


def detection_curve(scores: Float[np.ndarray, " N"], damaged: Bool[np.ndarray, " N"]) -> Float[np.ndarray, " N_plus_1"]:
    """The share of damaged data among the n most harmful, for n = 0 … N.

    The curve of Koh and Liang (ICML 2017, §5.4), by which mislabelled data are found.

    Args:
      scores: `[N]`, the more negative the more harmful; ties keep the order of the data.
      damaged: `[N]`, the ground truth.

    Returns:
      `[N + 1]`, from 0 to 1; all 0 where nothing is damaged.

    Raises:
      TypeError: `damaged` holds no booleans.
      ValueError: shapes that differ, no data, or scores that are not finite.

    Examples:
      >>> import numpy as np
      >>> import metainfluence as mi
      >>> scores, damaged = np.asarray([0.3, -0.9, 0.1, -0.2]), np.asarray([False, True, True, False])
      >>> mi.evaluation.detection_curve(scores, damaged).tolist()
      [0.0, 0.5, 0.5, 1.0, 1.0]
    """
    scores = numbers("scores", scores, (1,))
    found = np.cumsum(flags("damaged", damaged, scores.shape)[np.argsort(scores, kind="stable")])
    return np.concatenate([[0], found]) / max(found[-1], 1)


def found_at(scores: Float[np.ndarray, " N"], damaged: Bool[np.ndarray, " N"], share: float) -> float:
    """The share of damaged data found when the given share of all data, rounded to a whole number, is inspected.

    Raises:
      TypeError: as `detection_curve`.
      ValueError: as `detection_curve`; a share outside [0, 1].

    Examples:
      >>> import numpy as np
      >>> import metainfluence as mi
      >>> scores, damaged = np.asarray([0.3, -0.9, 0.1, -0.2]), np.asarray([False, True, True, False])
      >>> mi.evaluation.found_at(scores, damaged, 0.5)  # one of the two most harmful, of two that are damaged
      0.5
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share: expected a number from 0 to 1, got {share!r}")
    return float(detection_curve(scores, damaged)[round(share * len(scores))])


def roc_auc(scores: Float[np.ndarray, " N"], damaged: Bool[np.ndarray, " N"]) -> float:
    """Probability that a damaged datum scores as more harmful than an undamaged one; ties count half.

    The Mann–Whitney statistic over its largest value (Hanley and McNeil, Radiology 143, 1982). Its interval is
    `bootstrap(roc_auc, scores, damaged)`.

    Args:
      scores: `[N]`, the more negative the more harmful.
      damaged: `[N]`, the ground truth.

    Returns:
      From 0 to 1; 0.5 for constant scores; NaN where all data are damaged, or none.

    Raises:
      TypeError: as `detection_curve`.
      ValueError: as `detection_curve`.

    Examples:
      >>> import numpy as np
      >>> import metainfluence as mi
      >>> scores, damaged = np.asarray([0.3, -0.9, 0.1, -0.2]), np.asarray([False, True, True, False])
      >>> mi.evaluation.roc_auc(scores, damaged)  # three of the four pairs are in order
      0.75
    """
    from scipy.stats import rankdata

    scores = numbers("scores", scores, (1,))
    damaged = flags("damaged", damaged, scores.shape)
    positives = int(np.sum(damaged))
    pairs = positives * (len(damaged) - positives)
    if pairs == 0:
        return float("nan")
    return float((np.sum(rankdata(-scores)[damaged]) - positives * (positives + 1) / 2) / pairs)


def roc_auc_difference(
    scores: Float[np.ndarray, " N"], others: Float[np.ndarray, " N"], damaged: Bool[np.ndarray, " N"], **options: Any
) -> Estimate:
    """`roc_auc` of one method minus that of another on the same data, with an interval by a paired bootstrap.

    Args:
      scores: `[N]`, of the first method.
      others: `[N]`, of the second method.
      damaged: `[N]`, the ground truth.
      **options: of `bootstrap`.

    Raises:
      TypeError: as `roc_auc`.
      ValueError: as `roc_auc` and `bootstrap`.

    Examples:
      >>> import numpy as np
      >>> import metainfluence as mi
      >>> damaged = np.asarray([False, True, True, False])
      >>> scores, others = np.asarray([0.3, -0.9, -0.6, 0.2]), np.zeros(4)  # all in order, and all ties
      >>> [float(end) for end in mi.evaluation.roc_auc_difference(scores, others, damaged)]
      [0.5, 0.5, 0.5]
    """

    def difference(scores: np.ndarray, others: np.ndarray, damaged: np.ndarray) -> float:
        return roc_auc(scores, damaged) - roc_auc(others, damaged)

    return bootstrap(difference, scores, others, damaged, **options)

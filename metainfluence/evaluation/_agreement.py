"""Predicted against retrained: correlations of scores, and agreement of the changes of λ."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, PyTree

from metainfluence.evaluation._bootstrap import Estimate, bootstrap, flags, numbers


class DatamodelingScore(NamedTuple):
    """Linear datamodeling score.

    Attributes:
      mean: over the targets, with the interval of that mean.
      targets: of every target, `[targets]`.
    """

    mean: Estimate
    targets: Estimate


class Correlation(NamedTuple):
    """Two correlations of the same pairs.

    Attributes:
      pearson: of the values.
      spearman: of their ranks, mean ranks for ties.
    """

    pearson: Estimate
    spearman: Estimate


class StepAgreement(NamedTuple):
    """Predicted changes of λ against retrained ones, `[m]` each; NaN where a change is 0 and the ratio is not defined.

    Attributes:
      cosine: of the angle between the two.
      norm_ratio: ‖predicted‖ / ‖retrained‖.
      relative_error: ‖predicted − retrained‖ / ‖retrained‖.
    """

    cosine: Float[np.ndarray, " m"]
    norm_ratio: Float[np.ndarray, " m"]
    relative_error: Float[np.ndarray, " m"]


def linear_datamodeling_score(
    scores: Float[ArrayLike, "*targets T"],
    kept: Bool[ArrayLike, "m T"],
    outcomes: Float[ArrayLike, "m *targets"],
    **options: Any,
) -> DatamodelingScore:
    """LDS: Spearman correlation over subsets of predicted and retrained outcomes (Park et al., TRAK, ICML 2023, §2).

    In that paper an attribution is what a datum adds to the target, and the prediction for a subset is the sum over the
    data it keeps. A score is the change of the target on removal, the negative of an attribution. So the prediction
    here is the sum over the data the subset *lacks*; the two differ only by a constant. Perfect scores give +1.

    Args:
      scores: `[T]` for one target, or `[targets, T]`: predicted change of each target when a datum is removed.
      kept: `[m, T]`, which data each subset keeps, as `random_subsets` returns it.
      outcomes: `[m]`, or `[m, targets]`: the targets after retraining on each subset.
      **options: of `bootstrap`, which resamples the subsets.

    Returns:
      NaN for a target whose predictions or whose outcomes are the same for all subsets; the mean is then NaN too.

    Raises:
      TypeError: `kept` holds no booleans.
      ValueError: shapes that do not match, nothing to compare, or values that are not finite.

    Examples:
      >>> import numpy as np
      >>> import metainfluence as mi
      >>> scores = np.asarray([0.667, 0.333, -1.0])  # of the mean of 0, 1 and 5
      >>> kept = np.asarray([[False, True, True], [True, False, True], [True, True, False]])
      >>> outcomes = np.asarray([3.0, 2.5, 0.5])  # the means of what is kept
      >>> float(mi.evaluation.linear_datamodeling_score(scores, kept, outcomes).mean.value.round(3))
      1.0
    """
    values, results = numbers("scores", scores, (1, 2)), numbers("outcomes", outcomes, (1, 2))
    if values.ndim != results.ndim or values.shape[:-1] != results.shape[1:]:
        raise ValueError(
            f"outcomes: expected [m] for scores [T], or one column for each row of scores [targets, T], got shapes "
            f"{results.shape} and {values.shape}"
        )
    removed = ~flags("kept", kept, (len(results), values.shape[-1]))
    columns = np.atleast_2d(values).T
    predicted = removed.astype(float) @ columns
    # Equal predictions that differ by the rounding of their sums must not be ranked.
    rounding = len(columns) * np.finfo(float).eps * np.sum(np.abs(columns), axis=0)
    predicted = np.where(np.ptp(predicted, axis=0) <= rounding, 0.0, predicted)

    def statistic(predicted: np.ndarray, results: np.ndarray) -> np.ndarray:
        correlations = _correlation(_ranks(predicted), _ranks(results))
        return np.append(correlations, np.mean(correlations))

    both = bootstrap(statistic, predicted, results.reshape(len(results), -1), **options)
    return DatamodelingScore(Estimate(*(end[-1] for end in both)), Estimate(*(end[:-1] for end in both)))


def loo_correlation(scores: Float[ArrayLike, " n"], changes: Float[ArrayLike, " n"], **options: Any) -> Correlation:
    """Correlations over data of predicted and retrained leave-one-out changes (Koh and Liang, ICML 2017, §4.1).

    Args:
      scores: `[n]`, predicted changes of the target when each datum is removed.
      changes: `[n]`, the target after retraining without it, minus the target before.
      **options: of `bootstrap`, which resamples the data.

    Returns:
      NaN where either side is constant.

    Raises:
      ValueError: shapes that differ, no data, or values that are not finite.

    Examples:
      >>> import numpy as np
      >>> import metainfluence as mi
      >>> scores = np.asarray([0.667, 0.333, -1.0])  # of the mean of 0, 1 and 5
      >>> changes = np.asarray([3.0, 2.5, 0.5]) - 2.0
      >>> found = mi.evaluation.loo_correlation(scores, changes)
      >>> [float(each.value.round(3)) for each in found]
      [1.0, 1.0]
    """
    predicted, found = numbers("scores", scores, (1,)), numbers("changes", changes, (1,))
    if predicted.shape != found.shape:
        raise ValueError(f"changes: expected the shape {predicted.shape} of the scores, got {found.shape}")

    def statistic(predicted: np.ndarray, found: np.ndarray) -> np.ndarray:
        return np.stack([_correlation(predicted, found), _correlation(_ranks(predicted), _ranks(found))])

    both = bootstrap(statistic, predicted, found, **options)
    return Correlation(*(Estimate(*(end[k] for end in both)) for k in range(2)))


def seed_agreement(outcomes: Float[ArrayLike, "seeds m"], **options: Any) -> Estimate:
    """The noise floor: mean Spearman correlation over pairs of seeds of the outcomes after the same interventions.

    It is what training's own randomness leaves of a correlation: no score can be expected to agree better with one
    seed's outcomes than another seed's outcomes do.

    Args:
      outcomes: `[seeds, m]`, as `retrain` gives them for several keys.
      **options: of `bootstrap`, which resamples the interventions.

    Returns:
      NaN where a seed's outcomes are constant.

    Raises:
      ValueError: fewer than two seeds, no interventions, or values that are not finite.

    Examples:
      >>> import numpy as np
      >>> import metainfluence as mi
      >>> outcomes = np.asarray([[1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]])
      >>> float(mi.evaluation.seed_agreement(outcomes).value.round(3))  # 1 - 6 (1 + 1) / (4 (16 - 1))
      0.8
    """
    results = numbers("outcomes", outcomes, (2,))
    if len(results) < 2:
        raise ValueError(f"outcomes: expected at least two seeds, got shape {results.shape}")
    one, other = np.triu_indices(len(results), 1)

    def statistic(columns: np.ndarray) -> np.ndarray:
        ranks = _ranks(columns)
        return np.mean(_correlation(ranks[:, one], ranks[:, other]))

    return bootstrap(statistic, results.T, **options)


def step_agreement(predicted: PyTree, retrained: PyTree) -> StepAgreement:
    """How predicted changes of λ agree with retrained ones, in direction and in length.

    Args:
      predicted: pytree with leaves `[m, ...]`: changes of λ, such as minus the delta of `task_if` for removal.
      retrained: of the same structure and shapes: λ after retraining minus λ before.

    Raises:
      ValueError: structures or shapes that differ, or values that are not finite.

    Examples:
      >>> import numpy as np
      >>> import metainfluence as mi
      >>> predicted, retrained = np.asarray([[3.0, 4.0]]), np.asarray([[6.0, 8.0]])
      >>> found = mi.evaluation.step_agreement(predicted, retrained)
      >>> [each.tolist() for each in found]  # the right direction, half of the length
      [[1.0], [0.5], [0.5]]
    """
    expected: Any = jax.tree.structure(predicted)
    if jax.tree.structure(retrained) != expected:
        raise ValueError(
            f"retrained: expected the structure {expected} of predicted, got {jax.tree.structure(retrained)}"
        )
    ours, truth = _rows("predicted", predicted), _rows("retrained", retrained)
    if ours.shape != truth.shape:
        raise ValueError(f"retrained: expected the shape {ours.shape} of predicted in all, got {truth.shape}")
    size, length = np.linalg.norm(ours, axis=1), np.linalg.norm(truth, axis=1)
    error = np.linalg.norm(ours - truth, axis=1)
    return StepAgreement(
        _ratio(np.sum(ours * truth, axis=1), size * length), _ratio(size, length), _ratio(error, length)
    )


def _rows(name: str, tree: PyTree) -> np.ndarray:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    if len({leaf.shape[:1] for leaf in leaves}) != 1 or leaves[0].ndim == 0:
        shapes = [leaf.shape for leaf in leaves]
        raise ValueError(f"{name}: expected leaves with a common leading axis, got shapes {shapes}")
    return numbers(name, np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1), (2,))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the first axis, mean ranks for ties."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=0))


def _correlation(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pearson's, along the first axis; NaN where a side does not vary."""
    varies = (np.ptp(left, axis=0) > 0) & (np.ptp(right, axis=0) > 0)
    left, right = (side - np.mean(side, axis=0) for side in (left, right))
    spread = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=0)
    return _ratio(np.sum(left * right, axis=0), np.where(varies, spread, 0.0))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    safe = np.where(denominator == 0, 1.0, denominator)
    return np.where(denominator == 0, np.nan, numerator / safe)

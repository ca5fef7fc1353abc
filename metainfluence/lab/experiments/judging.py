"""Compares scores of runs with retraining: agreement, intervals, differences, and the rule that picks a method."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

import metainfluence as mi
from metainfluence.evaluation import Estimate, bootstrap, roc_auc
from metainfluence.lab.experiments.bank import Account
from metainfluence.lab.experiments.run_methods import ESTIMATORS, TRAJECTORY, Scored
from metainfluence.lab.experiments.runs import LEFT_OUT, Truth

AUC = "damaged"


class Judged(NamedTuple):
    """Methods compared on one training.

    Attributes:
      names: names of the methods.
      options: each method's option in use.
      agreement: column -> estimates [methods]: Spearman correlation with retraining, mean over starts and targets.
      ahead: column -> estimates [methods]: trajectory's agreement minus each method's, resampled in pairs.
      auc: [methods], mean over the starts; NaN if nothing was damaged.
    """

    names: list[str]
    options: list[str]
    agreement: dict[str, Estimate]
    ahead: dict[str, Estimate]
    auc: np.ndarray


def correlations(predicted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Spearman correlations along the first axis; 0 if a side does not vary or is not finite."""
    left, right = (rankdata(side, axis=0) - (len(side) + 1) / 2 for side in (predicted, found))
    scale = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=0)
    # Columns that hold NaN have NaN ranks.
    return np.nan_to_num(np.sum(left * right, axis=0) / np.where(scale > 0, scale, np.inf))


def predictions(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Changes [m, S, J] of the targets that scores [S, J, T] predict: sums over the removed tasks."""
    found: np.ndarray = np.moveaxis(scores @ (~kept).T.astype(float), -1, 0)
    return found


def agreement(
    scores: Sequence[np.ndarray], truth: Truth, draws: int
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Agreement of every method, and how far the first method is ahead of each.

    Args:
      scores: [S, J, T] of each method.
      truth: the results of retraining.
      draws: draws of the bootstrap, which resamples removals: these are the same for all starts.

    Returns:
      Both as column -> estimates [methods].
    """
    values, ahead = {}, {}
    for column, kept in truth.kept.items():
        # The removals are the first axis, since they are resampled.
        predicted = np.stack([predictions(each.astype(float), kept) for each in scores], axis=1)
        found = np.moveaxis(truth.changes[column], 1, 0)

        def statistic(predicted: np.ndarray, found: np.ndarray) -> np.ndarray:
            each = correlations(predicted, found[:, None]).mean(axis=(1, 2))
            return np.stack([each, each[0] - each])

        both = bootstrap(statistic, predicted, found, num=draws)
        values[column] = Estimate(*(end[0] for end in both))
        ahead[column] = Estimate(*(end[1] for end in both))
    return values, ahead


def mean_agreement(scores: np.ndarray, truth: Truth) -> float:
    """Mean over all columns, without an interval; the best option is chosen by it."""
    return float(
        np.mean(
            [
                correlations(predictions(scores, kept), np.moveaxis(truth.changes[column], 1, 0)).mean()
                for column, kept in truth.kept.items()
            ]
        )
    )


def kept_options(found: Sequence[Scored], truth: Truth) -> list[Scored]:
    """Each method's default option and, if it is another, the option with the highest mean agreement."""
    names = list(dict.fromkeys(each.method for each in found))
    kept = []
    for name in names:
        own = [each for each in found if each.method == name]
        best = max(own, key=lambda each: mean_agreement(each.scores, truth))
        kept += [each for each in own if each.default or each is best]
    return kept


def in_use(found: Sequence[Scored], truth: Truth, best: bool) -> list[Scored]:
    """One option of each method, the default or the best; trajectory comes first."""
    names = list(dict.fromkeys(each.method for each in found))
    chosen = []
    for name in [TRAJECTORY, *(name for name in names if name != TRAJECTORY)]:
        own = [each for each in found if each.method == name]
        chosen.append(
            max(own, key=lambda each: mean_agreement(each.scores, truth))
            if best
            else next(each for each in own if each.default)
        )
    return chosen


def judged(account: Account, chosen: Sequence[Scored], draws: int) -> Judged:
    """Compares methods, of which the first is trajectory, with retraining."""
    scores = [each.scores for each in chosen]
    values, ahead = agreement(scores, account.truth, draws)
    auc = np.full(len(scores), np.nan)
    if account.damaged.any():
        auc = np.asarray([np.mean([area(own.mean(0), account.damaged) for own in each]) for each in scores])
    return Judged([each.method for each in chosen], [each.option for each in chosen], values, ahead, auc)


def area(scores: np.ndarray, damaged: np.ndarray) -> float:
    """ROC AUC; that of guessing if scores are not finite."""
    return float(roc_auc(scores, damaged)) if np.all(np.isfinite(scores)) else 0.5


def rule(account: Account, best: bool) -> list[dict[str, Any]]:
    """What `metainfluence.choose` picks for each start and each removal, with the three estimators' agreement."""
    chosen = {each.method: each.scores for each in in_use(account.scores, account.truth, best)}
    rows = []
    for column, kept in account.truth.kept.items():
        share = 0.0 if column == LEFT_OUT else float(column)
        for start, fact in enumerate(account.facts):
            picked = mi.choose(
                gradient_norm=fact["gradient_norm_relative"],
                smoothness=fact["smoothness"],
                share_removed=share,
                run=True,
                checkpoints=True,
            ).estimator
            found = {
                name: float(
                    correlations(
                        predictions(chosen[name][start : start + 1], kept),
                        np.moveaxis(account.truth.changes[column][start : start + 1], 1, 0),
                    ).mean()
                )
                for name in ESTIMATORS
            }
            rows.append(
                {
                    "training": account.name,
                    "removed": column,
                    "start": start,
                    "smoothness": fact["smoothness"],
                    "picked": picked,
                    **found,
                    "short": max(found.values()) - found[picked],
                }
            )
    return rows

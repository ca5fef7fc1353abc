"""A budget of a result's errors by source, and what to do about the largest."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from metainfluence import solvers
from metainfluence._checks import concrete
from metainfluence.data import Task, Weights
from metainfluence.influence import Edit
from metainfluence.problem import Bilevel
from metainfluence.response import (
    OptimumInfo,
    RunInfo,
    SegmentsInfo,
    problems_of_run,
    problems_of_segments,
)
from metainfluence.solvers import SolveInfo, SolveStatus
from metainfluence.trust import _words as words
from metainfluence.trust._kinks import left_out_by_kinks


class ErrorBudget(NamedTuple):
    """Relative errors of a result by source, each the worst over its right-hand sides.

    Attributes:
      outer_residual: bound on the solution's error from the unfinished solve, ‖r‖ / (μ ‖x‖) with the residual r and the
        smallest curvature μ that was seen: ‖x − H⁻¹b‖ ≤ ‖H⁻¹‖ ‖r‖ (Higham, Accuracy and Stability of Numerical
        Algorithms, 2002, ch. 7). Infinite where μ ≤ 0.
      precision: estimate of the error from rounding, eps ‖b‖ / (μ ‖x‖): the same bound with a residual of eps, that of
        the lowest precision in which the losses are computed. Where rounding ended the solve (INDEFINITE at μ > 0, or a
        dense matrix), the actual residual counts.
      inner_residual: ‖∂_θ L_in‖, an estimate: to first order, the total gradient is off by this divided by the inner
        problem's smallest curvature (Pedregosa, ICML 2016, Theorem 2), which is unknown here and assumed to be 1.
        Infinite where a task's parameters are found not to be near a minimum, NaN where nothing is known about them.
      outer_stationarity: ‖D_λF‖ / μ, an estimate: for a quadratic F it bounds the distance from λ to the stationary
        point that the formula assumes. Relative to ‖λ‖ where that is known, else absolute.
      min_curvature: μ.
      dominant: name of the largest error.
      advice: a sentence on what that means and what to do.
      asymmetry: bound on the solution's error from products that are not those of a symmetric matrix, which inexact
        derivatives cause: the same bound with half of `SolveInfo.asymmetry`; 0 where rounding explains it.
      kinks: the share of the gradient's change along random directions that H's products miss because of kinks; NaN
        where `problem` was not given.
    """

    outer_residual: float
    precision: float
    inner_residual: float
    outer_stationarity: float
    min_curvature: float
    dominant: str
    advice: str
    asymmetry: float = 0.0
    kinks: float = float("nan")


# Of equal terms the more telling one first: a residual due to rounding is not an unfinished solve.
_ORDER = ("asymmetry", "kinks", "precision", "outer_residual", "inner_residual", "outer_stationarity")

# Errors below this do not matter for what scores are used for: rankings, signs and a few digits.
SMALL = 1e-4


def error_budget(
    result: Any,
    meta_params: PyTree = None,
    *,
    problem: Bilevel | None = None,
    tasks: Task | None = None,
    weights: Weights | None = None,
) -> ErrorBudget:
    """Splits the error of a result by source; for use outside jit.

    Args:
      result: an `Influence`, `Scores`, `Edit`, `Sweep`, `SolveInfo`, or the answer of a run's response.
      meta_params: λ, whose norm the distance from stationarity is relative to; None for the norm that the result knows.
      problem: the result's problem, in which to look for kinks; this compiles and takes ten gradients near λ. None
        skips it.
      tasks: the result's tasks; needed with `problem`.
      weights: the result's weights; None for unit weights.

    Raises:
      TypeError: `result` is none of these, or traced.
      ValueError: a `problem` without λ or tasks.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> found = jax.jit(mi.task_if(problem))(jnp.asarray(1.6), tasks)
      >>> budget = mi.error_budget(found)
      >>> budget.dominant, round(budget.outer_stationarity, 3)  # the minimum, 2, is 0.4 away from 1.6
      ('outer_stationarity', 0.25)
    """
    info = told_of(result)
    if not isinstance(info, SolveInfo):
        return budget_of_run(info)
    kinks = float("nan")
    if problem is not None:
        if meta_params is None or tasks is None:
            raise ValueError("problem: expected meta_params and tasks beside it, the point at which to look for kinks")
        kinks = left_out_by_kinks(problem, meta_params, tasks, weights)
    return budget_of_solves(result, meta_params, SMALL, kinks)


def budget_of_solves(result: Any, meta_params: PyTree, small: float, kinks: float = float("nan")) -> ErrorBudget:
    """As `error_budget`; where the largest term is at most `small`, the advice is to leave it at that."""
    info = told_of(result)
    curvature = np.asarray(info.min_curvature, float)
    positive = np.where(curvature > 0, curvature, np.nan)
    with np.errstate(invalid="ignore"):
        amplified = number(info.effective_curvature) / positive
    residual, skew = number(info.relative_residual), number(info.asymmetry)
    inexact = np.where(skew > tolerated_asymmetry(info), skew, 0.0)
    eps = np.maximum(np.maximum(eps_of(info), number(info.working_eps)), np.where(rounded(info), residual, 0.0))
    known = 1.0 if info.meta_params_norm is None else np.asarray(info.meta_params_norm, float)
    length = np.maximum(known if meta_params is None else float(optax.tree.norm(meta_params)), np.finfo(float).tiny)
    distance = number(info.outer_gradient_norm) / positive / length
    if isinstance(result, Edit):
        # A searched edit's answer is where its last step led; of other edits the most stationary point is judged.
        norms = number(info.outer_gradient_norm)
        kept = np.argmin(norms, axis=-1, keepdims=True) if result.step_lengths is None else [norms.shape[-1] - 1]
        distance = np.take_along_axis(distance, np.broadcast_to(kept, (*norms.shape[:-1], 1)), axis=-1)
    inner = info.inner_gradient_norm
    terms = {
        "outer_residual": _worst(residual * amplified),
        "precision": _worst(np.maximum(eps, np.where(inexact > 0, 0.0, skew / 2)) * amplified),
        "inner_residual": float("nan") if inner is None else _worst(number(inner)),
        "outer_stationarity": _worst(distance),
        "asymmetry": _worst(np.where(inexact > 0, inexact / 2 * amplified, 0.0)),
        "kinks": kinks,
    }
    measured = [name for name in _ORDER if not np.isnan(terms[name])]
    dominant = max(measured, key=lambda name: terms[name])
    if terms["inner_residual"] == np.inf:
        dominant = "inner_residual"
    budget = ErrorBudget(**terms, min_curvature=float(np.min(curvature)), dominant=dominant, advice="")
    # No training and no solve removes an error that is due to rounding alone.
    return budget._replace(advice=words.advice(result, info, budget, max(small, eps_of(info) ** (2 / 3))))


def budget_of_run(info: Any) -> ErrorBudget:
    """The budget of a run's answer, which assumes no stationary point and has no distance from one."""
    if isinstance(info, OptimumInfo):
        raise TypeError("result: expected an answer, got a response; ask it first")
    if isinstance(info, RunInfo):
        told, curvature = problems_of_run(info), float("nan")
        calm = "the derivative of the run holds as far as rounding lets it; whether it predicts a removal, "
        calm += "smoothness tells"
        eps = 0.0 if info.growth is None else float(np.finfo(np.asarray(info.growth).dtype).eps)
        replay = 0.0 if info.replay_difference is None else _worst(np.asarray(info.replay_difference))
        terms = {"precision": 0.0 if info.growth is None else eps * _worst(np.asarray(info.growth)), "residual": replay}
    else:
        told, curvature = problems_of_segments(info), float(np.min(np.asarray(info.min_curvature)))
        calm = "the segments are solved; how well they stand for the run between the checkpoints, more of them tell"
        eps = float(np.finfo(np.asarray(info.relative_error).dtype).eps)
        terms = {"precision": eps, "residual": _worst(np.sum(np.asarray(info.relative_error), axis=-1))}
    dominant = "precision" if terms["precision"] >= terms["residual"] else "outer_residual"
    return ErrorBudget(
        outer_residual=terms["residual"],
        precision=terms["precision"],
        inner_residual=0.0,
        outer_stationarity=0.0,
        min_curvature=curvature,
        dominant=dominant,
        advice="; ".join(told) if told else calm,
    )


def told_of(result: Any) -> Any:
    """The report that a result carries: a `SolveInfo`, or that of a response."""
    info = getattr(result, "info", result)
    if not isinstance(info, (SolveInfo, RunInfo, SegmentsInfo, OptimumInfo)):
        raise TypeError(f"result: expected a result with SolveInfo, got {type(result).__name__}")
    if not concrete(info):
        raise TypeError("result: expected values, got traced arrays; call this outside jit")
    return info


def eps_of(info: SolveInfo) -> float:
    """Machine epsilon of the solve's numbers."""
    return float(jnp.finfo(np.asarray(info.relative_residual).dtype).eps)


def tolerated_asymmetry(info: SolveInfo) -> float:
    """The asymmetry that exact derivatives may show, including the rounding of their inner linear solves."""
    return max(eps_of(info), float(np.max(number(info.working_eps)))) ** 0.5


def rounded(info: SolveInfo) -> Any:
    """Where the residual is due to rounding, and not to an unfinished solve or to flat directions."""
    positive = (np.asarray(info.min_curvature) > 0) & np.isfinite(np.asarray(info.relative_residual))
    indefinite = np.asarray(info.status) == SolveStatus.INDEFINITE
    found = indefinite & ~(number(info.flat_directions) > 0)
    if info.choice is not None:
        dense = np.isin(np.asarray(info.choice), (solvers.Choice.DENSE, solvers.Choice.DENSE_ABSOLUTE))
        found = found | (dense & (found | ~indefinite))
    return positive & found


def number(values: Any) -> Any:
    """Values as a NumPy array; 0 where the report has none."""
    return np.zeros(()) if values is None else np.asarray(values, float)


def _worst(values: Any) -> float:
    """The largest; NaN means that there is no bound, and counts as infinite."""
    return float(np.max(np.where(np.isnan(values), np.inf, values)))

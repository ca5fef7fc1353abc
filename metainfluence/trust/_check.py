"""What a result's numbers rest on: failed solves, and a budget of the errors of those that succeeded."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import PyTree

from metainfluence import solvers
from metainfluence._checks import concrete
from metainfluence.influence import Edit
from metainfluence.response import (
    OptimumInfo,
    RunInfo,
    SegmentsInfo,
    problems_of_run,
    problems_of_segments,
    warn_of_direct_effect,
)
from metainfluence.solvers import SolveInfo, SolveStatus
from metainfluence.trust._coupling import CouplingWarning


class SolveError(RuntimeError):
    """Right-hand sides that were not solved, or not as well as was asked for."""


class SlopeWarning(UserWarning):
    """Scores that are all 0 because the target has no gradient."""


class ErrorBudget(NamedTuple):
    """Relative errors of a result by their source, the worst over its right-hand sides.

    Attributes:
      outer_residual: bound on the solution's error from the unfinished solve, ‖r‖ / (μ ‖x‖) with the residual r and the
        smallest curvature μ that was seen: ‖x − H⁻¹b‖ ≤ ‖H⁻¹‖ ‖r‖ (Higham, Accuracy and Stability of Numerical
        Algorithms, 2002, ch. 7). Infinite where μ ≤ 0.
      precision: estimate of what rounding leaves, eps ‖b‖ / (μ ‖x‖), by the same bound with a residual of eps; with the
        residual that there is where rounding is what ended the solve: INDEFINITE at μ > 0, or a dense matrix.
      inner_residual: ‖∂_θ L_in‖: to first order the total gradient is off by that over the inner problem's smallest
        curvature (Pedregosa, ICML 2016, Theorem 2), which is not known here and taken for 1: an estimate. Infinite
        where a task's parameters are seen to be near no minimum.
      outer_stationarity: ‖D_λF‖ / μ, which bounds, for a quadratic F, the distance to the point that the formula takes
        λ for; relative to ‖λ‖ where that was given, else absolute: an estimate.
      min_curvature: μ.
      dominant: name of the largest of the four.
      advice: a sentence on what that means and what to do.
    """

    outer_residual: float
    precision: float
    inner_residual: float
    outer_stationarity: float
    min_curvature: float
    dominant: str
    advice: str


_EPS64 = float(np.finfo(np.float64).eps)
_NO_MINIMUM = (
    "an inner problem has no minimum where its parameters are: its Hessian has a negative eigenvalue there, or its "
    "gradient is larger than the curvature allows; regularise the inner objective, start it elsewhere, or let its "
    "minimiser take more steps"
)
_FLOAT64 = 'compute in float64 (jax.config.update("jax_enable_x64", True), or JAX_ENABLE_X64=1)'
_ONE_CALL = 'in float32 try solver=metainfluence.solvers.auto(tol=1e-3) with damping="auto" first'
_ADVICE = {
    "outer_residual": "the unfinished solve dominates: lower the solver's tol, allow more steps, or raise the damping",
    "precision": f"rounding dominates: {_FLOAT64}, or raise the damping",
    "inner_residual": "the inner minimisers dominate: lower their tol or allow more steps",
    "outer_stationarity": "λ is not stationary: the formula answers for the proximal problem F(λ') + δ/2 ‖λ' − λ − "
    "D_λF/δ‖² that λ does minimise; train on first, on all tasks at once with a falling learning rate, until "
    'outer_gradient_norm is small; or take the Newton-corrected λ of edit(problem, damping="auto", '
    "num_newton_steps=…)(meta_params, tasks, weights, weights), and ask there; each step is taken as far as F falls",
}
# Below what scores are used for: rankings, signs and a few digits.
_SMALL = 1e-4
_NOTHING_LARGE = "no error is large, and a lower tol or more training would bring little; the largest is this"
_ROUNDING = (
    "no curvature that was met is negative, and what ended the solve is most likely rounding at a badly conditioned "
    "Hessian: {}raise the damping; of solvers.ekfac it tells that its approximation has an eigenvalue that is not "
    "positive"
)
_NOT_FINITE = (
    "no number here holds: NaN or infinity came from the data, the weights, meta_params, the target's data or the "
    "inner solve; called outside jit, the functions name the task and the leaf"
)
_NO_SLOPE = (
    "the target's gradient is exactly 0, and so is every score: accuracy, argmax and thresholds have no gradient; take "
    "a loss"
)
_NO_SUPPORT = (
    "every score of a support example is exactly 0: adaptation does not see the data weights, as where a closed form "
    "leaves out its coefficients, or a task_loss weights.support; metainfluence.coupling(problem)(meta_params, task) "
    "tells"
)


def error_budget(result: Any, meta_params: PyTree = None) -> ErrorBudget:
    """Splits the error of a result into its sources; for use outside jit.

    Args:
      result: an `Influence`, `Scores`, `Edit`, `Sweep`, `SolveInfo`, or the answer of a run's response.
      meta_params: λ, to which the distance from stationarity is relative; None for the one that the result knows.

    Raises:
      TypeError: `result` is none of these, or traced.

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
    info = _told_of(result)
    if not isinstance(info, SolveInfo):
        return _budget_of_run(info)
    return _budget(result, meta_params, _SMALL)


def _budget(result: Any, meta_params: PyTree, small: float) -> ErrorBudget:
    """As `error_budget`; where the largest term is at most `small`, the advice is to leave it at that."""
    info = _told_of(result)
    curvature = np.asarray(info.min_curvature, float)
    positive = np.where(curvature > 0, curvature, np.nan)
    effective = _number(info.effective_curvature)
    residual = _number(info.relative_residual)
    eps = np.maximum(_eps(info), np.where(_rounded(info), residual, 0.0))
    known = 1.0 if info.meta_params_norm is None else np.asarray(info.meta_params_norm, float)
    length = np.maximum(known if meta_params is None else float(optax.tree.norm(meta_params)), np.finfo(float).tiny)
    distance = _number(info.outer_gradient_norm) / positive / length
    if isinstance(result, Edit):
        # A searched edit's answer is where its last step led; of others the nearest point is judged.
        norms = _number(info.outer_gradient_norm)
        kept = np.argmin(norms, axis=-1, keepdims=True) if result.step_lengths is None else [norms.shape[-1] - 1]
        distance = np.take_along_axis(distance, np.broadcast_to(kept, (*norms.shape[:-1], 1)), axis=-1)
    terms = {
        "outer_residual": _worst(residual * effective / positive),
        "precision": _worst(eps * effective / positive),
        "inner_residual": _worst(_number(info.inner_gradient_norm)),
        "outer_stationarity": _worst(distance),
    }
    # Of equals the more telling one: a residual that is rounding's is no unfinished solve.
    order = ("precision", "outer_residual", "inner_residual", "outer_stationarity")
    dominant = max(order, key=lambda name: terms[name])
    smallest = float(np.min(curvature))
    large = terms[dominant] > small
    advice = f"{_ADVICE[dominant] if large else _NOTHING_LARGE} ({dominant} {terms[dominant]:.1e})"
    if large and dominant == "outer_residual" and _eps(info) > _EPS64:
        advice += f"; where more steps do not lower the residual, {_FLOAT64}"
    if not np.isfinite(terms["inner_residual"]):
        dominant, advice = "inner_residual", _NO_MINIMUM
    if not smallest > 0:
        advice = (
            f"the curvature is {smallest:.1e} along a direction that was met, and no bound holds: λ is no minimum; "
            "raise the damping, or solve with |H| (solvers.auto does where it must)"
        )
    if np.any(np.asarray(info.status) == SolveStatus.NONFINITE):
        advice = _NOT_FINITE
    if info.flat_directions is not None and np.any(np.asarray(info.flat_directions) > 0):
        flat = int(np.max(np.asarray(info.flat_directions)))
        advice = f"flat directions: {flat}, along which the answer is 0; {advice}"
    silent = "; ".join(line for line in (_without_slope(result), _without_support(result)) if line)
    advice = f"{silent}; {advice}" if silent else advice
    return ErrorBudget(**terms, min_curvature=smallest, dominant=dominant, advice=advice)


def check(result: Any, *, tol: float | None = None) -> Any:
    """Raises `SolveError` unless every solve behind `result` converged and every inner problem has a minimum.

    For use outside jit.

    Args:
      result: an `Influence`, `Scores`, `Edit`, `Sweep` or `SolveInfo`; a response, or the answer of a run's.
      tol: raise, too, where a term of the `error_budget` is above this or the target's gradient is exactly 0.

    Warns:
      SlopeWarning: the target's gradient is exactly 0, and so is every score; an error with `tol`.
      CouplingWarning: every score of a support example is exactly 0.
      DirectEffectWarning: the target's tasks share support data with training, see `influence_scores`.

    Returns:
      `result`, unchanged.

    Raises:
      SolveError: naming the right-hand sides that failed, how, and what to do; an inner problem without a minimum;
        with `tol`, a target whose gradient is exactly 0, or the term above `tol`.
      TypeError: `result` is none of these, or traced.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> hill = mi.from_task_loss(lambda m, task, w: -0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> found = jax.jit(mi.task_if(hill, solver=mi.solvers.cg()))(jnp.asarray(2.0), tasks)
      >>> mi.check(found)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
          ...
      metainfluence.trust._check.SolveError: 3 of 3 solves ended INDEFINITE (right-hand sides 0, 1, 2; ...
    """
    info = _told_of(result)
    if not isinstance(info, SolveInfo):
        return _checked_run(result, info, tol)
    status = np.asarray(info.status)
    lines = [_failures(info, status, kind) for kind in SolveStatus if kind != SolveStatus.CONVERGED]
    failed = "; ".join(line for line in lines if line)
    if failed:
        raise SolveError(f"{failed}. Error budget: {error_budget(result).advice}")
    if not np.all(np.isfinite(_number(info.inner_gradient_norm))):
        raise SolveError(_NO_MINIMUM)
    if told := _without_slope(result):
        if tol is not None:
            raise SolveError(told)
        warnings.warn(told, SlopeWarning, stacklevel=2)
    if told := _without_support(result):
        warnings.warn(told, CouplingWarning, stacklevel=2)
    warn_of_direct_effect(result)
    if tol is not None:
        budget = _budget(result, None, small=tol)
        worst = float(getattr(budget, budget.dominant))
        if not worst <= tol:
            raise SolveError(f"expected every term of the error budget to be at most {tol:.1e}: {budget.advice}")
    return result


def _checked_run(result: Any, info: Any, tol: float | None) -> Any:
    """`check` of a response, or of what a run's response has answered."""
    if isinstance(info, OptimumInfo):
        if not np.all(np.isfinite(_number(info.inner_gradient_norm))):
            raise SolveError(_NO_MINIMUM)
        return result
    told = problems_of_run(info) if isinstance(info, RunInfo) else problems_of_segments(info)
    if told:
        raise SolveError("; ".join(told))
    if message := _without_support(result):
        warnings.warn(message, CouplingWarning, stacklevel=3)
    budget = _budget_of_run(info)
    worst = float(getattr(budget, budget.dominant))
    if tol is not None and not worst <= tol:
        raise SolveError(f"expected every term of the error budget to be at most {tol:.1e}: {budget.advice}")
    return result


def _budget_of_run(info: Any) -> ErrorBudget:
    """The budget of an answer for a run: no stationary point is presumed, so that none is missed."""
    if isinstance(info, OptimumInfo):
        raise TypeError("result: expected an answer, got a response; ask it first")
    if isinstance(info, RunInfo):
        told, curvature = problems_of_run(info), float("nan")
        eps = 0.0 if info.growth is None else float(np.finfo(np.asarray(info.growth).dtype).eps)
        replay = 0.0 if info.replay_difference is None else _worst(np.asarray(info.replay_difference))
        terms = {"precision": 0.0 if info.growth is None else eps * _worst(np.asarray(info.growth)), "residual": replay}
    else:
        told, curvature = problems_of_segments(info), float(np.min(np.asarray(info.min_curvature)))
        eps = float(np.finfo(np.asarray(info.relative_error).dtype).eps)
        terms = {"precision": eps, "residual": _worst(np.sum(np.asarray(info.relative_error), axis=-1))}
    dominant = "precision" if terms["precision"] >= terms["residual"] else "outer_residual"
    calm = "the derivative of the run holds as far as rounding lets it; whether it predicts a removal, smoothness tells"
    return ErrorBudget(
        outer_residual=terms["residual"],
        precision=terms["precision"],
        inner_residual=0.0,
        outer_stationarity=0.0,
        min_curvature=curvature,
        dominant=dominant,
        advice="; ".join(told) if told else calm,
    )


def _failures(info: SolveInfo, status: np.ndarray, kind: SolveStatus) -> str:
    failed = np.argwhere(status == kind)
    if not len(failed):
        return ""
    named = ", ".join(str(tuple(index.tolist())) if index.size > 1 else str(*index.tolist()) for index in failed[:8])
    which = f"right-hand sides {named}{' …' if len(failed) > 8 else ''}" if status.ndim else "the right-hand side"
    select = tuple(failed[0])
    return (
        f"{len(failed)} of {status.size} solves ended {kind.name} ({which}; first: relative residual "
        f"{float(np.asarray(info.relative_residual)[select]):.2e}, smallest curvature "
        f"{float(np.asarray(info.min_curvature)[select]):.2e}, "
        f"{int(np.asarray(info.num_matvecs)[select])} products): {remedy(info, select)}"
    )


def remedy(info: SolveInfo, select: tuple[int, ...] = ()) -> str:
    """What to do about the solve at an index, which did not converge."""
    kind = SolveStatus(int(np.asarray(info.status)[select]))
    if kind == SolveStatus.INDEFINITE and np.broadcast_to(_rounded(info), np.shape(info.status))[select]:
        return _ROUNDING.format(f"{_FLOAT64}, or " if _eps(info) > _EPS64 else "")
    if kind == SolveStatus.MAX_STEPS and info.choice is not None and _eps(info) > _EPS64:
        return f"{_ONE_CALL}; {solvers.REMEDIES[kind]}"
    return solvers.REMEDIES[kind]


def _eps(info: SolveInfo) -> float:
    return float(np.finfo(np.asarray(info.relative_residual).dtype).eps)


def _rounded(info: SolveInfo) -> Any:
    """Where the residual is what rounding left, and not what a solver left undone."""
    positive = (np.asarray(info.min_curvature) > 0) & np.isfinite(np.asarray(info.relative_residual))
    rounded = np.asarray(info.status) == SolveStatus.INDEFINITE
    if info.choice is not None:
        rounded = rounded | np.isin(np.asarray(info.choice), (solvers.Choice.DENSE, solvers.Choice.DENSE_ABSOLUTE))
    return positive & rounded


def _without_slope(result: Any) -> str:
    """What to tell of scores for a target without a gradient; of `self_influence`, which has no target, nothing."""
    if not hasattr(result, "task") or getattr(result.info, "effective_curvature", None) is None:
        return ""
    one_target = np.ndim(result.info.status) == np.ndim(result.task) - 1
    silent = one_target and np.any(np.asarray(result.info.effective_curvature) == 0)
    # A target that depends on the weights themselves has scores without a gradient in λ.
    return _NO_SLOPE if silent and not any(map(np.any, (result.task, result.support, result.query))) else ""


def _without_support(result: Any) -> str:
    """What to tell of scores that are 0 for all support examples, though not for all data."""
    if not hasattr(result, "support") or not np.size(result.support):
        return ""
    return _NO_SUPPORT if not np.any(np.asarray(result.support)) and np.any(np.asarray(result.task)) else ""


def _told_of(result: Any) -> Any:
    """What a result tells of itself: a `SolveInfo`, or that of a response."""
    info = getattr(result, "info", result)
    if not isinstance(info, (SolveInfo, RunInfo, SegmentsInfo, OptimumInfo)):
        raise TypeError(f"result: expected a result with SolveInfo, got {type(result).__name__}")
    if not concrete(info):
        raise TypeError("result: expected values, got traced arrays; call this outside jit")
    return info


def _number(values: Any) -> Any:
    """Values as NumPy's; 0 where a solver alone knows none."""
    return np.zeros(()) if values is None else np.asarray(values, float)


def _worst(values: Any) -> float:
    """The largest; NaN, by which there is no bound, counts as infinite."""
    return float(np.max(np.where(np.isnan(values), np.inf, values)))

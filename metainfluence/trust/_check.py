"""Raises or warns where a result's numbers cannot be trusted."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from metainfluence import solvers
from metainfluence.response import (
    OptimumInfo,
    RunInfo,
    problems_of_run,
    problems_of_segments,
    warn_of_direct_effect,
)
from metainfluence.solvers import SolveInfo, SolveStatus
from metainfluence.trust import _words as words
from metainfluence.trust._budget import (
    SMALL,
    budget_of_run,
    budget_of_solves,
    eps_of,
    number,
    rounded,
    told_of,
    tolerated_asymmetry,
)
from metainfluence.trust._coupling import CouplingWarning

# Relative errors that leave no correct digit. The distance from a stationary point is computed with the smallest
# curvature, and is mostly shorter.
_MEANINGLESS = {"outer_stationarity": 10.0}


class SolveError(RuntimeError):
    """Right-hand sides that were not solved, or not as accurately as requested."""


class SlopeWarning(UserWarning):
    """Scores that are all 0 because the target has no gradient."""


class BudgetWarning(UserWarning):
    """Numbers without a correct digit, by the error budget."""


def check(result: Any, *, tol: float | None = None) -> Any:
    """Raises `SolveError` unless every solve behind `result` converged and every inner problem has a minimum.

    For use outside jit.

    Args:
      result: an `Influence`, `Scores`, `Edit`, `Sweep` or `SolveInfo`; a response, or the answer of a run's.
      tol: also raise where a term of the `error_budget` is above this or the target's gradient is exactly 0.

    Warns:
      BudgetWarning: not one digit is sure: λ is not a minimum along a direction that was met, or a term of the
        `error_budget` is above 1 (10 for the distance from a stationary point). With `tol` this is an error.
      SlopeWarning: the target's gradient is exactly 0, and so is every score. With `tol` this is an error.
      CouplingWarning: every score of a support example is exactly 0, or the scores of a task's query examples do not
        add up to the task's, as happens if the loss divides by the sum of the query weights.
      DirectEffectWarning: the target's tasks share support data with training, see `influence_scores`.

    Returns:
      `result`, unchanged.

    Raises:
      SolveError: right-hand sides that failed; the message says which, how, and what to do. Also an inner problem
        without a minimum; with `tol`, a target whose gradient is exactly 0, or a term above `tol`.
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
    info = told_of(result)
    if not isinstance(info, SolveInfo):
        return _checked_run(result, info, tol)
    status = np.asarray(info.status)
    lines = [_failures(info, status, kind) for kind in SolveStatus if kind != SolveStatus.CONVERGED]
    failed = "; ".join(line for line in lines if line)
    nowhere = np.any(number(info.inner_gradient_norm) == np.inf) or np.any(np.isnan(number(info.inner_gradient_norm)))
    if nowhere:
        # Whatever ended the solves follows from this.
        raise SolveError(f"{words.NO_MINIMUM}; with that, {failed}" if failed else words.NO_MINIMUM)
    budget = budget_of_solves(result, None, SMALL if tol is None else tol)
    if failed:
        raise SolveError(f"{failed}. Error budget: {budget.advice}")
    if told := words.without_slope(result):
        if tol is not None:
            raise SolveError(told)
        warnings.warn(told, SlopeWarning, stacklevel=2)
    if told := words.without_support(result) or words.not_linear(result):
        warnings.warn(told, CouplingWarning, stacklevel=2)
    warn_of_direct_effect(result)
    worst = float(getattr(budget, budget.dominant))
    if tol is not None and not (worst <= tol and budget.min_curvature > 0):
        raise SolveError(f"expected every term of the error budget to be at most {tol:.1e}: {budget.advice}")
    if not (worst <= _MEANINGLESS.get(budget.dominant, 1.0) and budget.min_curvature > 0):
        warnings.warn(f"not one digit is sure: {budget.advice}", BudgetWarning, stacklevel=2)
    return result


def _checked_run(result: Any, info: Any, tol: float | None) -> Any:
    """`check` of a response, or of the answer of a run's response."""
    if isinstance(info, OptimumInfo):
        if not np.all(np.isfinite(number(info.inner_gradient_norm))):
            raise SolveError(words.NO_MINIMUM)
        return result
    told = problems_of_run(info) if isinstance(info, RunInfo) else problems_of_segments(info)
    if told:
        raise SolveError("; ".join(told))
    if message := words.without_support(result):
        warnings.warn(message, CouplingWarning, stacklevel=3)
    budget = budget_of_run(info)
    worst = float(getattr(budget, budget.dominant))
    if tol is not None and not worst <= tol:
        raise SolveError(f"expected every term of the error budget to be at most {tol:.1e}: {budget.advice}")
    return result


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
    if kind == SolveStatus.NONFINITE:
        return solvers.REMEDIES[kind]
    if info.asymmetry is not None and float(np.asarray(info.asymmetry)[select]) > tolerated_asymmetry(info):
        return words.inexact(info)
    single = eps_of(info) > np.finfo(np.float64).eps
    if told := words.seen_flat(info, select):
        # In single precision a small curvature cannot be told from none.
        return f"{words.ONE_CALL}; {told}" if kind == SolveStatus.MAX_STEPS and single else told
    if kind == SolveStatus.INDEFINITE and np.broadcast_to(rounded(info), np.shape(info.status))[select]:
        return words.ROUNDING.format(f"{words.FLOAT64}, or " if single else "")
    told = solvers.REMEDIES[kind]
    if kind == SolveStatus.MAX_STEPS and info.choice is not None and single:
        return f"{words.ONE_CALL}; {told}"
    return told if single else told.replace("precondition, or compute in float64", "or precondition")

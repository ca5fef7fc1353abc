"""What a report on solves means in words: causes in order of precedence, each with its remedy."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from metainfluence import solvers
from metainfluence.solvers import SolveInfo, SolveStatus

_EPS64 = float(np.finfo(np.float64).eps)
NO_MINIMUM = (
    "an inner problem has no minimum where its parameters are: its Hessian has a negative eigenvalue there, or its "
    "gradient is larger than the curvature allows; regularise the inner objective, start it elsewhere, or let its "
    "minimiser take more steps"
)
FLOAT64 = 'compute in float64 (jax.config.update("jax_enable_x64", True), or JAX_ENABLE_X64=1)'
UNKNOWN = "; whether an inner problem of yours is solved is unknown (closed_form measures it by inner_loss)"
ONE_CALL = 'in float32 try solver=metainfluence.solvers.auto(tol=1e-3) with damping="auto" first'
_COARSE = (
    "the losses are computed in {low}, though λ is held in {high}: make the network compute in {high} (dtype, "
    "param_dtype, compute_dtype) and hold every leaf of λ in it, at least for influence"
)
ADVICE = {
    "outer_residual": "the unfinished solve dominates: lower the solver's tol, allow more steps, or raise the damping",
    "precision": f"rounding dominates: {FLOAT64}, or raise the damping",
    "inner_residual": "the inner minimisers dominate: lower their tol or allow more steps",
    "outer_stationarity": "λ is not stationary, and the formula answers for a proximal problem: train on, on all tasks "
    "at once with a falling learning rate, until outer_gradient_norm is small; or ask at the Newton-corrected λ of "
    'edit(problem, damping="auto", num_newton_steps=…)(meta_params, tasks, weights, weights)',
    "kinks": "kinks dominate: second derivatives leave out what ReLU, |x|, max or clipping do between the smooth "
    "pieces; take softplus, tanh or GELU, or trust the order of the scores rather than their size",
}
# For a solve that ended with a small residual: the remaining error is due to the curvature.
FINISHED = (
    "the solve is finished, to {residual:.0e}, which along the smallest curvature may still be {largest:.0e} of the "
    "answer: lower the solver's tol, or raise the damping"
)
_NOTHING_LARGE = (
    "all is well: no error is large, and a lower tol or more training would bring little; the largest is this"
)
ROUNDING = (
    "no curvature that was met is negative, and what ended the solve is most likely rounding at a badly conditioned "
    "Hessian: {}raise the damping; of solvers.ekfac it tells that its approximation has an eigenvalue that is not "
    "positive"
)
_INEXACT = (
    "your custom derivative is inexact by {size:.0e}: solve its inner problem further. The products with H are not "
    "symmetric, as those of exact derivatives are; a stop_gradient, as in first-order MAML, does it too"
)
INNER_INEXACT = (
    "inner problems are solved to a gradient of {norm:.0e} only, which makes their derivatives inexact by {size:.0e}: "
    "lower the tol of their minimizer or allow more steps"
)
_NOT_FINITE = (
    "no number here holds: NaN or infinity came from the data, the weights, meta_params, the target's data or the "
    "inner solve; called outside jit, the functions name the task and the leaf"
)
SEEN = (
    "{share} of the right-hand side lies along flat directions of H, of which the tasks say nothing (a symmetry, a "
    "leaf behind stop_gradient, rows of an embedding that no task uses): there is no answer along them, and the one of "
    "least norm, which solvers.auto gives, is 0 there; a meta_regularizer or damping makes them matter"
)
_NEARLY_FLAT = (
    "; or the direction is flat, as a symmetry of the loss makes it: a curvature of {curvature:.1e} is no more than "
    "‖D_λF‖ / ‖λ‖ = {least:.1e}, below which no one can tell. Then train on, or raise the damping"
)
NO_SLOPE = (
    "the target's gradient is exactly 0, and so is every score: accuracy, argmax and thresholds have no gradient; take "
    "a loss"
)
NO_SUPPORT = (
    "every score of a support example is exactly 0: adaptation does not see the data weights, as where a closed form "
    "leaves out its coefficients, or a task_loss weights.support; metainfluence.coupling(problem)(meta_params, task) "
    "tells"
)
NOT_LINEAR = (
    "the task loss is not linear in the query weights: the scores of task {k}'s query examples add up to {total:.2g} "
    "and not to the task's {task:.2g}; do not divide by the sum of the weights, but by the number of examples, as in "
    "jnp.sum(w.query * losses) / len(losses); metainfluence.coupling(problem)(meta_params, task) tells"
)
_UNWEIGHED = (
    "part of the task loss does not hang on the query weights: the scores of task {k}'s query examples add up to "
    "{total:.2g} and not to the task's {task:.2g}; metainfluence.coupling(problem)(meta_params, task) tells"
)


def advice(result: Any, info: SolveInfo, budget: Any, small: float) -> str:
    """The most important problem and its remedy; or that all is well, if no error is above `small`."""
    silent = (without_slope(result), without_support(result) or not_linear(result))
    told = "; ".join(line for line in silent if line)
    cause = _cause(info, budget, small)
    flat = 0 if info.flat_directions is None else int(np.max(np.asarray(info.flat_directions)))
    if flat and np.all(np.asarray(info.status) == SolveStatus.CONVERGED):
        asked = "the target" if hasattr(result, "task") else "the right-hand sides"
        cause = f"flat directions: {flat}, not seen by {asked}, along which the answer is 0; {cause}"
    elif flat:
        cause = f"flat directions: {flat}; {cause}"
    if np.isnan(budget.inner_residual) and info.outer_gradient_norm is not None:
        cause += UNKNOWN
    return f"{told}; {cause}" if told else cause


def _cause(info: SolveInfo, budget: Any, small: float) -> str:
    if np.any(np.asarray(info.status) == SolveStatus.NONFINITE):
        return _NOT_FINITE
    if budget.inner_residual == np.inf:
        return NO_MINIMUM
    skew = 0.0 if info.asymmetry is None else float(np.max(np.asarray(info.asymmetry)))
    failed = np.any(np.asarray(info.status) != SolveStatus.CONVERGED)
    if budget.asymmetry > 0 and (failed or budget.asymmetry > small or not budget.min_curvature > 0):
        return f"{inexact(info)} (asymmetry {skew:.1e})"
    if failed and (seen := seen_flat(info)):
        return seen
    if not budget.min_curvature > 0:
        return (
            f"the curvature is {budget.min_curvature:.1e} along a direction that was met, and no bound holds: λ is no "
            f"minimum; {_beyond_indefinite(info)}{_nearly_flat(info, budget)}"
        )
    largest = float(getattr(budget, budget.dominant))
    if not largest > small:
        return f"{_NOTHING_LARGE} ({budget.dominant} {largest:.1e})"
    hint = _nearly_flat(info, budget) if budget.dominant == "outer_stationarity" else ""
    return f"{_of_term(info, budget.dominant, largest, small)}{hint} ({budget.dominant} {largest:.1e})"


def _nearly_flat(info: SolveInfo, budget: Any) -> str:
    """What to add where the smallest curvature may be that of a flat direction at a λ not trained to the end.

    Along a path λ(t) of constant F, λ'ᵀHλ' = −⟨D_λF, λ''⟩: a symmetry has a curvature of about ‖D_λF‖ / ‖λ‖, of either
    sign.
    """
    if info.meta_params_norm is None or info.outer_gradient_norm is None:
        return ""
    length = float(np.max(np.asarray(info.meta_params_norm)))
    least = float(np.max(np.asarray(info.outer_gradient_norm))) / length if length > 0 else 0.0
    damping = 0.0 if info.damping is None else float(np.max(np.asarray(info.damping)))
    if damping > 0 or not abs(budget.min_curvature) <= least:
        return ""
    # Only for a curvature that is small compared with those that the solution met.
    if not least <= 1e-2 * float(np.max(np.asarray(info.effective_curvature, float))):
        return ""
    return _NEARLY_FLAT.format(curvature=budget.min_curvature, least=least)


def _of_term(info: SolveInfo, dominant: str, largest: float, small: float) -> str:
    """What to do about a term."""
    eps = _eps(info)
    if dominant == "precision":
        if told := _coarse(info):
            return told
        return ADVICE["precision"] if eps > _EPS64 else "rounding dominates, in float64: raise the damping"
    if dominant == "outer_residual":
        told = _unsolved(info, largest, small)
        return told if eps <= _EPS64 else f"{told}; where more steps do not lower the residual, {FLOAT64}"
    if dominant == "asymmetry":
        return inexact(info)
    return ADVICE[dominant]


def _unsolved(info: SolveInfo, largest: float, small: float) -> str:
    """What to say about a residual that dominates."""
    residual = float(np.max(np.asarray(info.relative_residual)))
    if np.all(np.asarray(info.status) == SolveStatus.CONVERGED) and residual <= small:
        return FINISHED.format(residual=residual, largest=largest)
    return ADVICE["outer_residual"]


def _coarse(info: SolveInfo) -> str:
    """What to say where the losses are computed in less precision than λ is held in."""
    if info.working_eps is None:
        return ""
    found = float(np.max(np.asarray(info.working_eps, float)))
    if not found > 1.5 * _eps(info):
        return ""
    names = {float(jnp.finfo(name).eps): name for name in ("bfloat16", "float16", "float32")}
    low = names.get(found, f"a precision of {found:.1e}")
    return _COARSE.format(low=low, high=np.asarray(info.relative_residual).dtype.name)


def _beyond_indefinite(info: SolveInfo) -> str:
    """What is left to do about negative curvature."""
    absolute = (solvers.Choice.DENSE_ABSOLUTE, solvers.Choice.KRYLOV_ABSOLUTE)
    if info.choice is not None and np.any(np.isin(np.asarray(info.choice), absolute)):
        return (
            "the answer is that for |H| and the derivative of nothing; train closer to a minimum, or raise the damping"
        )
    if info.choice is None and np.all(np.asarray(info.status) == SolveStatus.CONVERGED):
        # A solver may have been told to use |H|, and does not say so.
        return "train closer to a minimum, or raise the damping"
    return "raise the damping, or solve with |H| (solvers.auto does where it must)"


def inexact(info: SolveInfo) -> str:
    """What to say about products that are not symmetric."""
    size = float(np.max(np.asarray(info.asymmetry)))
    norm = 0.0 if info.inner_gradient_norm is None else float(np.max(np.asarray(info.inner_gradient_norm)))
    if norm > _eps(info) ** 0.5:
        return INNER_INEXACT.format(norm=norm, size=size)
    return _INEXACT.format(size=size)


def seen_flat(info: SolveInfo, select: Any = None) -> str:
    """What to say about right-hand sides that were not solved because they have a part along flat directions."""
    if info.flat_directions is None:
        return ""
    unsolved = (np.asarray(info.status) != SolveStatus.CONVERGED) & (np.asarray(info.flat_directions) > 0)
    if select is not None:
        unsolved = unsolved[select]
        share = float(np.asarray(info.relative_residual)[select])
    elif np.any(unsolved):
        share = float(np.max(np.where(unsolved, np.asarray(info.relative_residual), 0)))
    if not np.any(unsolved):
        return ""
    # The residual is the part along them, unless the solver ran off along them.
    return SEEN.format(share=f"{share:.0%}" if share < 1 else "a part")


def without_slope(result: Any) -> str:
    """What to say about scores for a target without a gradient; nothing for `self_influence`, which has no target."""
    if not _of_one_target(result) or getattr(result.info, "effective_curvature", None) is None:
        return ""
    silent = np.any(np.asarray(result.info.effective_curvature) == 0)
    # A target that depends on the weights themselves has scores without a gradient in λ.
    return NO_SLOPE if silent and not any(map(np.any, (result.task, result.support, result.query))) else ""


def without_support(result: Any) -> str:
    """What to say about scores that are 0 for all support examples, though not for all data."""
    if not hasattr(result, "support") or not np.size(result.support):
        return ""
    return NO_SUPPORT if not np.any(np.asarray(result.support)) and np.any(np.asarray(result.task)) else ""


def not_linear(result: Any) -> str:
    """What to say where scores of query examples do not add up to their task's, as they do for a weighted sum."""
    if not _of_one_target(result) or not np.size(result.query):
        return ""
    task, query = np.asarray(result.task, float), np.asarray(result.query, float)
    if query.ndim != task.ndim + 1 or not (np.all(np.isfinite(task)) and np.all(np.isfinite(query))):
        return ""
    total, size = np.sum(query, axis=-1), np.sum(np.abs(query), axis=-1)
    off = np.abs(total - task) - 1e-3 * (size + np.abs(task))
    if not np.any(off > 0):
        return ""
    worst = np.unravel_index(np.argmax(off), off.shape)
    # A quotient of weighted sums does not change with the scale of the weights, so that its parts add up to 0.
    scale_free = np.abs(total[worst]) <= 1e-3 * size[worst]
    said = NOT_LINEAR if scale_free and size[worst] > 0 else _UNWEIGHED
    return said.format(k=int(worst[-1]), total=float(total[worst]), task=float(task[worst]))


def _of_one_target(result: Any) -> bool:
    """Whether a result holds scores for one target, or for several in turn; `self_influence` has none."""
    return hasattr(result, "task") and np.ndim(getattr(result.info, "status", 0)) == np.ndim(result.task) - 1


def _eps(info: SolveInfo) -> float:
    return float(np.finfo(np.asarray(info.relative_residual).dtype).eps)

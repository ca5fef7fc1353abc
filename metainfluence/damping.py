"""Damping: a rule that reports its reasons, and a sweep that shows the plateau."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from metainfluence import solvers, subspace
from metainfluence._checks import check_positive, concrete, maker
from metainfluence._spoilt import weighed
from metainfluence.curvature import Curvature
from metainfluence.data import Task, Weights
from metainfluence.operators import flat_norm
from metainfluence.problem import Bilevel
from metainfluence.response import (
    RANK,
    Damping,
    Options,
    check_total_effect,
    checked,
    rule,
    shares_support,
    slopes_of,
    warn_of_direct_effect,
)
from metainfluence.solvers import Preconditioner, SolveInfo, grown, reachable

__all__ = ["Damping", "Sweep", "auto", "rule", "sweep"]


class DampingAt(Protocol):
    """What `auto` makes."""

    def __call__(self, meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Damping:
        """The damping at λ, and what decided it."""


class SweepAt(Protocol):
    """What `sweep` makes."""

    def __call__(self, meta_params: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Sweep:
        """Scores at many dampings."""


@maker
def auto(
    problem: Bilevel,
    *,
    curvature: Curvature | None = None,
    rank: int = RANK,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
    precision: str | None = "highest",
) -> DampingAt:
    """Makes (meta_params, tasks, weights=None) -> Damping, by the rule behind `damping="auto"`; `rank` products.

    δ is the largest of three values, each for something unknown about the quadratic model that influence rests on:

    - *Curvature*: 2 (r − θ)₊, where θ is the smallest Ritz value of H and r its residual: an eigenvalue may be as low
      as θ − r. At a minimum none is negative. An eigenvalue of −μ says that H is off by about μ in every direction, so
      that eigenvalues below μ say nothing. With δ = 2μ the lowest damped eigenvalue is μ, and no direction is amplified
      by more than is known about it.
    - *Stationarity*: ‖D_λF‖ / (0.1 ‖λ‖). At a λ that is not stationary, the formula holds for a proximal problem that λ
      does minimise: F(λ') + δ/2 ‖λ' − c‖² with the centre c = λ + D_λF/δ. This δ keeps the centre within a tenth of ‖λ‖
      from λ.
    - *Precision*: 100 eps · largest Ritz value, below which rounding dominates.

    Args:
      problem: the problem.
      curvature: one of `metainfluence.curvature`; None for `exact()`.
      rank: Lanczos steps; more find the smallest eigenvalue more sharply, and δ falls with r.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.
      precision: as in `task_if`.

    Raises:
      ValueError: as `total_hessian`; `rank` is not a positive integer.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> found = jax.jit(mi.damping.auto(problem))(jnp.asarray(1.0), tasks)
      >>> round(float(found.value), 3)  # ‖D_λF‖ / (0.1 ‖λ‖) with D_λF = 1 − 2
      10.0
      >>> round(float(found.by_curvature), 3), round(float(found.smallest), 3)
      (0.0, 1.0)
    """
    check_positive("rank", rank, integer=True)
    shared: dict[str, Any] = {
        "curvature": curvature,
        "batch_size": batch_size,
        "mesh": mesh,
        "hvp": hvp,
        "precision": precision,
    }
    options = Options.of(problem, **shared)

    def run(meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Damping:
        with options.traced():
            point = checked(meta_params, tasks, weights)
            found = options.expanded(*point, options.chunks(*point[:2]))
            return rule(found.operator, found.gradient, point[0], rank)

    return run


class Sweep(NamedTuple):
    """Scores over a grid of dampings.

    Attributes:
      dampings: ascending, `[D]`.
      task: `[D, T]`, as in `Scores`.
      support: `[D, T, n_support]`.
      query: `[D, T, n_query]`.
      rank_correlation: Spearman's correlation of the tasks' scores between each damping and the next, `[D - 1]`: near 1
        on the plateau, where the answer does not depend on the damping.
      info: report on the solves, `[D]`; `num_matvecs` counts the products of all of them together.
    """

    dampings: Float[Array, " D"]
    task: Float[Array, "D T"]
    support: Float[Array, "D T n_support"]
    query: Float[Array, "D T n_query"]
    rank_correlation: Float[Array, " D-1"]
    info: SolveInfo


@maker
def sweep(
    problem: Bilevel,
    target: Callable[..., Array],
    dampings: Sequence[float] | Float[Array, " D"],
    *,
    curvature: Curvature | None = None,
    tol: Any = 1e-6,
    max_size: int | None = None,
    absolute: bool = True,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
    precision: str | None = "highest",
    total_effect: bool = False,
) -> SweepAt:
    """Makes (meta_params, tasks, *target_args, weights=None) -> Sweep: scores at many dampings from one Krylov basis.

    Krylov spaces do not change when a multiple of the identity is added, so the basis that solves at the smallest
    damping holds the solutions at all others, and their residuals are known without a further product.

    Args:
      problem: the problem.
      target: φ, as in `influence_scores`.
      dampings: the grid, non-negative and ascending.
      curvature: one of `metainfluence.curvature`; None for `exact()`.
      tol: relative residual at the smallest damping.
      max_size: vectors in the basis; None for 200, at most the operator's size.
      absolute: whether to solve with |H| at dampings at which H + δI is not positive definite; the residual then falls
        less regularly with the damping, as `info` shows. If False, such solves end INDEFINITE.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.
      precision: as in `task_if`.
      total_effect: as in `influence_scores`.

    Raises:
      ValueError: dampings that are not ascending and non-negative, and as `influence_scores`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> meta_params = jnp.asarray(2.0)  # the mean, which is the minimum
      >>> test_tasks = mi.Task(support=(), query=jnp.asarray([[3.0]]))
      >>> sweep = mi.damping.sweep(problem, mi.query_loss(problem), [0.0, 1.0])
      >>> found = jax.jit(sweep)(meta_params, tasks, test_tasks)
      >>> found.task.round(3).tolist()  # of the Hessian 1, and of 1 + 1
      [[-0.667, -0.333, 1.0], [-0.333, -0.167, 0.5]]
    """
    shared: dict[str, Any] = {
        "curvature": curvature,
        "batch_size": batch_size,
        "mesh": mesh,
        "hvp": hvp,
        "precision": precision,
    }
    options = Options.of(problem, **shared)
    check_positive("tol", tol)
    check_total_effect(total_effect)
    shape = jnp.shape(jnp.asarray(dampings))
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"dampings: expected at least one number, got shape {shape}")
    if concrete(dampings) and not (np.all(np.diff(dampings) > 0) and np.asarray(dampings)[0] >= 0):
        raise ValueError(f"dampings: expected non-negative numbers in ascending order, got {dampings!r}")

    def run(meta_params: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Sweep:
        with options.traced():
            found = swept(checked(meta_params, tasks, weights), target_args)
        warn_of_direct_effect(found)
        return found

    def swept(given: tuple[PyTree, Task, Weights], target_args: tuple[Any, ...]) -> Sweep:
        meta_params, tasks, resolved = given
        # Errors of the target are raised before the long part.
        slope, direct = slopes_of(target, meta_params, target_args, resolved, total_effect)
        shared = None if total_effect else shares_support(tasks, target_args)
        point = options.expanded(*given, options.chunks(meta_params, tasks))
        operator = point.operator
        grid = jnp.asarray(dampings, operator.shift.dtype)
        rhs = operator.domain.ravel(slope)[None]
        unpreconditioned = Preconditioner(lambda vector: vector, 0, 0)
        _, info, growth = grown(
            operator.damped(grid[0]),
            rhs,
            tol=tol,
            max_size=max_size,
            block_size=1,
            absolute=False,
            turn=absolute,
            linear=unpreconditioned,
        )
        scale = jnp.linalg.norm(rhs)
        values = subspace.ritz(growth.subspace)
        smallest = jnp.min(jnp.where(values.valid, values.values, jnp.inf)) + operator.shift

        def at(damping: Array) -> tuple[PyTree, SolveInfo]:
            shift = operator.shift + damping
            coordinates, residual, indefinite = subspace.galerkin(growth.subspace, rhs, shift, False)
            if absolute:
                coordinates, residual, indefinite = jax.lax.cond(
                    indefinite,
                    lambda: subspace.galerkin(growth.subspace, rhs, shift, True),
                    lambda: (coordinates, residual, indefinite),
                )
            solution = subspace.combine(growth.subspace, coordinates)[0]
            relative = jnp.linalg.norm(residual) / jnp.where(scale > 0, scale, 1)
            length = jnp.linalg.norm(solution)
            failure = jnp.where(indefinite, solvers.SolveStatus.INDEFINITE, solvers.SolveStatus.MAX_STEPS)
            status = jnp.where(
                relative <= reachable(tol, relative.dtype, operator.domain.coarsest),
                solvers.SolveStatus.CONVERGED,
                failure,
            )
            finite = jnp.isfinite(relative)
            report = SolveInfo(
                status=jnp.where(finite, status, solvers.SolveStatus.NONFINITE).astype(jnp.int32),
                num_matvecs=info.num_matvecs[0],
                relative_residual=relative,
                min_curvature=smallest + damping,
                outer_gradient_norm=flat_norm(point.gradient),
                inner_gradient_norm=point.inner_gradient_norm,
                effective_curvature=scale / jnp.where(length > 0, length, 1),
                damping=damping,
                meta_params_norm=flat_norm(meta_params),
                support_shared=shared,
                working_eps=jnp.asarray(point.working_eps, relative.dtype),
            )
            change = point.mixed_transposed(operator.domain.unravel(solution))
            if direct is not None:
                change = jax.tree.map(jnp.subtract, change, direct)
            return weighed(resolved, change, point.spoilt), report

        (task, support, query), infos = jax.lax.map(at, grid)
        return Sweep(grid, task, support, query, _rank_correlation(task), infos)

    return run


def _rank_correlation(scores: Float[Array, "D T"]) -> Float[Array, " D-1"]:
    """Spearman's, between neighbouring rows; ties are broken by position."""
    ranks = jnp.argsort(jnp.argsort(scores, axis=1), axis=1).astype(scores.dtype)
    centred = ranks - jnp.mean(ranks, axis=1, keepdims=True)
    unit = centred / jnp.maximum(jnp.linalg.norm(centred, axis=1, keepdims=True), jnp.finfo(scores.dtype).tiny)
    return jnp.sum(unit[1:] * unit[:-1], axis=1)

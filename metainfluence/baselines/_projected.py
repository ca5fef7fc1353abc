"""Influence in a small space: randomly projected gradients, and the leading eigenvectors of Gauss–Newton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from metainfluence import _lapack, solvers
from metainfluence._checks import check_batch_size, check_damping, check_positive
from metainfluence._chunks import reduce_tasks
from metainfluence.baselines._base import stacked_length
from metainfluence.curvature import gauss_newton
from metainfluence.data import Task, Weights, resolve_weights
from metainfluence.influence import Scores, influence_scores
from metainfluence.operators import Domain, Operator
from metainfluence.problem import Bilevel, check_meta_params, total_gradient
from metainfluence.solvers import Outcome, Solver, from_map
from metainfluence.subspace import Ritz

_PRECISION = jax.lax.Precision.HIGHEST


def trak(
    problem: Bilevel,
    target: Callable[..., Array],
    *,
    dim: int = 256,
    damping: Any = 0.1,
    seed: int = 0,
    ensemble: bool = False,
    batch_size: int | None = None,
) -> Callable[..., Scores]:
    """Makes (meta_params, tasks, *target_args, weights=None) -> Scores by TRAK, with total gradients as features.

    A datum's feature is P g with g = ∂_w D_λ(T·F), for a task its total gradient D_λL_k, and a matrix P `[dim, p]` of
    random signs (Park et al., ICML 2023). The score is w ⟨P g, (Φ + μI)⁻¹ P ∇φ⟩ / T, with Φ = (1/T) Σ_k w_k (P g_k)(P
    g_k)ᵀ over the tasks. It is in the target's units in so far as the tasks' gradient covariance resembles the total
    Hessian. Tasks, support and query examples share one Φ. The paper's features are gradients of a model's output, and
    its scores carry the loss's slope as a separate factor; the gradients of losses used here already contain it.

    P is made row by row from a key wherever it is needed, and never stored.

    Args:
      problem: the problem.
      target: as in `influence_scores`.
      dim: rows of P.
      damping: μ relative to the mean eigenvalue of Φ, not negative. With fewer tasks than `dim`, Φ alone is singular.
      seed: of P.
      ensemble: whether meta_params has a leading axis `[E, ...]` of independently trained λ, each with a P of its own;
        the scores are their mean.
      batch_size: tasks per chunk, which bounds the memory; None takes all tasks at once.

    Returns:
      Function whose info holds the residual that the projected direction leaves with the total Hessian, and the
      absolute damping μ, which that residual does not include; `[E]` with `ensemble`.

    Raises:
      ValueError: `dim` not a positive integer, damping negative, and as `influence_scores`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> score = jax.jit(mi.baselines.trak(problem, lambda m: m, dim=1, damping=0.0))
      >>> scores = score(jnp.asarray(2.0), tasks)  # (2 - query) / 3, over 14 / 3 for the mean square of the gradients
      >>> [round(x, 3) for x in scores.task.tolist()]
      [0.143, 0.071, -0.214]
    """
    check_positive("dim", dim, integer=True)
    check_damping(damping)
    check_batch_size(batch_size)
    gradient = total_gradient(problem)

    def single(
        meta_params: PyTree, key: Array, tasks: Task, weights: Weights, target_args: tuple[Any, ...]
    ) -> tuple[Scores, Array]:
        domain = Domain.of(meta_params)

        def project(vectors: Float[Array, "n p"]) -> Float[Array, "n dim"]:
            def row(number: Array) -> Array:
                signs = jax.random.rademacher(jax.random.fold_in(key, number), (domain.size,), domain.dtype)
                return jnp.matmul(vectors, signs, precision=_PRECISION)

            return jax.lax.map(row, jnp.arange(dim)).T

        def chunk(data: tuple[Task, Weights]) -> tuple[tuple[()], Array]:
            gradients = jax.vmap(lambda task, w: domain.ravel(gradient(meta_params, task, w)))(*data)
            return (), project(gradients)

        _, features = reduce_tasks(chunk, (tasks, weights), batch_size)
        weighted = features * (weights.task / len(features)).astype(features.dtype)[:, None]
        covariance = jnp.matmul(features.T, weighted, precision=_PRECISION)
        shift = jnp.asarray(damping, features.dtype) * jnp.trace(covariance) / dim
        factor = _lapack.cholesky(covariance + shift * jnp.eye(dim, dtype=features.dtype))

        def apply(operator: Operator, factor: Array, rhs: Array) -> Outcome:
            del operator
            lift = jax.linear_transpose(lambda vector: project(vector[None])[0], rhs)
            (solution,) = lift(_lapack.cho_solve(factor, project(rhs[None])[0]))
            return Outcome(solution, 0, jnp.inf)

        solver = _approximate(lambda operator: factor, apply)
        score = influence_scores(problem, target, solver=solver, batch_size=batch_size)
        return score(meta_params, tasks, *target_args, weights=weights), shift

    def run(meta_params: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Scores:
        weights = resolve_weights(weights, tasks)
        key = jax.random.key(seed)
        if not ensemble:
            check_meta_params(meta_params)
            scores, shift = single(meta_params, key, tasks, weights, target_args)
            return scores._replace(info=scores.info._replace(damping=shift))

        def members(data: tuple[PyTree, Array]) -> tuple[Scores, Array]:
            return single(data[0], data[1], tasks, weights, target_args)

        keys = jax.random.split(key, stacked_length(meta_params, "members of the ensemble"))
        each, shifts = jax.lax.map(members, (meta_params, keys))
        task, support, query = (jnp.mean(field, axis=0) for field in each[:3])
        return Scores(task, support, query, each.info._replace(damping=shifts))

    return run


def tlxml(
    problem: Bilevel,
    target: Callable[..., Array],
    *,
    threshold: float = 1e-3,
    rank: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Callable[..., Scores]:
    """Makes (meta_params, tasks, *target_args, weights=None) -> Scores by Gauss–Newton and a projected inverse.

    After TLXML (Mitsuka et al., arXiv 2501.14271), from which these are taken: influence through the total gradient,
    Gauss–Newton in place of the total Hessian, and, in place of damping, a pseudo-inverse in the space of the
    eigenvalues that are not negligible. The threshold's default, Lanczos vectors for large λ, and scores of examples
    (the paper ranks tasks) are this library's additions. The meta-regulariser's own curvature is included.

    Args:
      problem: the problem, made by `bilevel(model, adapt, outer_head=head)`.
      target: as in `influence_scores`.
      threshold: eigenvalues above this share of the largest one are inverted, from 0 to 1.
      rank: number of Lanczos vectors, and so of products, whose Ritz pairs are used; None uses all eigenvectors, with
        as many products as λ has numbers and a dense decomposition.
      seed: of Lanczos' start vector.
      batch_size: as in `influence_scores`.

    Returns:
      Function whose info holds the residual that the direction leaves with the complete Gauss–Newton matrix.

    Raises:
      ValueError: a problem without outer_head, a threshold outside [0, 1), `rank` not a positive integer, and as
        `influence_scores`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.bilevel(
      ...     lambda params, m, query: m[0] * query["x"],
      ...     mi.adaptation.closed_form(lambda m, support, coefficients: m),
      ...     outer_head=lambda outputs, query: 0.5 * (outputs - query["y"]) ** 2,
      ... )
      >>> query = {"x": jnp.ones((3, 1)), "y": jnp.asarray([[0.0], [1.0], [5.0]])}
      >>> score = jax.jit(mi.baselines.tlxml(problem, lambda m: m[0]))  # nothing is seen of m[1]: its eigenvalue is 0
      >>> scores = score(jnp.asarray([2.0, 7.0]), mi.Task(jnp.zeros((3, 1)), query))
      >>> [round(x, 3) for x in scores.task.tolist()]
      [0.667, 0.333, -1.0]
    """
    if isinstance(threshold, (bool, str)) or not 0 <= threshold < 1:
        raise ValueError(f"threshold: expected a number from 0 to 1, 1 excluded, got {threshold!r}")
    pairs = solvers.dense() if rank is None else solvers.lanczos(rank, seed=seed)

    def apply(operator: Operator, state: Ritz, rhs: Array) -> Outcome:
        del operator
        largest = jnp.max(jnp.where(state.valid, state.values, 0))
        kept = state.valid & (state.values > threshold * largest)
        inverse = jnp.where(kept, 1 / jnp.where(kept, state.values, 1), 0)
        components = inverse * jnp.matmul(state.vectors, rhs, precision=_PRECISION)
        solution = jnp.matmul(components, state.vectors, precision=_PRECISION)
        smallest = jnp.min(jnp.where(state.valid, state.values, jnp.inf))
        return Outcome(solution, len(state.values), smallest)

    solver = _approximate(pairs.init, apply)
    return influence_scores(problem, target, solver=solver, curvature=gauss_newton(), batch_size=batch_size)


def _approximate(init: Callable[[Operator], Any], apply: Callable[..., Outcome]) -> Solver:
    """A solver that may leave a residual, and reports the one that it leaves."""
    return from_map(init, apply, tol=lambda dtype: jnp.finfo(dtype).eps ** 0.5)

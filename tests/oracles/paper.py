"""The formulas of *Evaluating Data Influence in Meta Learning* (arXiv 2501.15963) from dense Jacobians, term by term.

Notation: L the task's outer loss, g = ∂_θ L_in the gradient of its inner objective, J = dθ/dλ, subscripts for partial
derivatives. Nothing here is differentiated through θ(λ), except J and d²θ/dλ² of problems that unroll their inner loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metainfluence as mi
from oracles.reference import Flat, flat, over_tasks, partial_loss, share, solved


class InnerJet(NamedTuple):
    """Partial derivatives of g = ∂_θ L_in."""

    by_t: Any  # g_θ, the inner Hessian [m, m]
    by_l: Any  # g_λ [m, p]
    by_tt: Any  # [m, m, m]
    by_tl: Any  # [m, m, p]
    by_ll: Any  # [m, p, p]


def inner_jet(problem: Flat, theta: Any, lam: Any, task: mi.Task, support: Any) -> InnerJet:
    """Dense derivatives up to the third order of the inner objective."""
    size = theta.shape[0]

    def g(point: Any) -> Any:
        return jax.grad(problem.inner)(point[:size], point[size:], task, support)

    point = jnp.concatenate([theta, lam])
    first, second = jax.jacfwd(g)(point), jax.jacfwd(jax.jacfwd(g))(point)
    return InnerJet(
        first[:, :size], first[:, size:], second[:, :size, :size], second[:, :size, size:], second[:, size:, size:]
    )


class LossJet(NamedTuple):
    """Partial derivatives of the outer loss L."""

    by_t: Any
    by_l: Any
    by_tt: Any
    by_tl: Any
    by_ll: Any


def loss_jet(problem: Flat, theta: Any, lam: Any, task: mi.Task, query: Any) -> LossJet:
    """Dense derivatives up to the second order."""
    size = theta.shape[0]

    def loss(point: Any) -> Any:
        return partial_loss(problem, point[:size], point[size:], task, query)

    point = jnp.concatenate([theta, lam])
    first, second = jax.grad(loss)(point), jax.jacfwd(jax.grad(loss))(point)
    return LossJet(first[:size], first[size:], second[:size, :size], second[:size, size:], second[size:, size:])


def sensitivity(jet: InnerJet) -> tuple[Any, Any]:
    """J = dθ/dλ = −H_in⁻¹ ∂_λ∂_θ L_in, and d²θ/dλ² from differentiating g(θ(λ), λ) = 0 twice."""
    first = -jnp.linalg.solve(jet.by_t, jet.by_l)
    crossed = jnp.einsum("npb,pa->nab", jet.by_tl, first)
    forcing = jnp.einsum("npq,pa,qb->nab", jet.by_tt, first, first) + crossed + jnp.swapaxes(crossed, 1, 2) + jet.by_ll
    second = -jnp.linalg.solve(jet.by_t, forcing.reshape(forcing.shape[0], -1)).reshape(forcing.shape)
    return first, second


class TaskTerms(NamedTuple):
    """Terms of one task's total gradient and total Hessian, and the dense forms of the surrogate curvatures."""

    total_gradient: Any  # Theorem 4.1
    fixed: Any  # ∂_λλ L
    linearized: Any  # all of the total Hessian but the term with d²θ/dλ²
    third: Any  # Σ_m ∂_θm L · d²θ_m/dλ²
    gamma: Any  # ‖∂_θ L‖₁, Theorem 5.1
    gauss_newton: Any  # (df/dλ)ᵀ · ∂²head · (df/dλ), f the outputs of the outer model
    query_gradients: Any  # D_λ ℓ_j / n_real of the query examples [n, p]
    support_gradients: Any  # D_λ P_j of Proposition 4.8 of the support examples [n, p]; None if unrolled


def task_terms(problem: Flat, theta: Any, lam: Any, task: mi.Task, support: Any, query: Any) -> TaskTerms:
    """Theorems 4.1 and 4.5 and Proposition 4.8, assembled."""
    outer = loss_jet(problem, theta, lam, task, query)
    if problem.inner is None:
        program = functools.partial(problem.program, task=task, support=support)
        first, second = jax.jacfwd(program)(lam), jax.jacfwd(jax.jacfwd(program))(lam)
        support_gradients = None
    else:
        jet = inner_jet(problem, theta, lam, task, support)
        first, second = sensitivity(jet)
        support_gradients = loss_difference_gradients(problem, jet, outer, first, theta, lam, task)

    size = theta.shape[0]
    motion = jnp.concatenate([first, jnp.eye(lam.shape[0])])

    def outputs(point: Any) -> Any:
        return problem.outputs(point[:size], point[size:], task)

    def head(outputs: Any) -> Any:
        return jnp.sum(share(query, task.query_mask) * problem.spec.head(outputs, task.query))

    point = jnp.concatenate([theta, lam])
    count = outputs(point).size
    slope = jax.jacfwd(outputs)(point).reshape(count, -1) @ motion
    curved = jax.hessian(head)(outputs(point)).reshape(count, count)
    each = jax.jacrev(lambda point: problem.losses(point[:size], point[size:], task))(point) @ motion
    crossed = outer.by_tl.T @ first
    return TaskTerms(
        total_gradient=outer.by_l + first.T @ outer.by_t,
        fixed=outer.by_ll,
        linearized=outer.by_ll + crossed + crossed.T + first.T @ outer.by_tt @ first,
        third=jnp.einsum("m,mab->ab", outer.by_t, second),
        gamma=jnp.sum(jnp.abs(outer.by_t)),
        gauss_newton=slope.T @ curved @ slope,
        query_gradients=share(jnp.ones_like(query), task.query_mask)[:, None] * each,
        support_gradients=support_gradients,
    )


def loss_difference_gradients(
    problem: Flat, jet: InnerJet, outer: LossJet, first: Any, theta: Any, lam: Any, task: mi.Task
) -> Any:
    """D_λ P of Proposition 4.8 for every support example [n, p], in the sign of up-weighting.

    inner-IF: s_j = dθ/du_j = −H_in⁻¹ a_j ∂_θ ℓ_j.  P_j = ∂_θ L · s_j, the loss difference that a unit of weight makes.
    D_λ P_j = (L_θλ + L_θθ J)ᵀ s_j + ∂_θ L · D_λ s_j,  where D_λ s_j = −H_in⁻¹ (a_j (ℓ_θλ + ℓ_θθ J) + (D_λ H_in) s_j).
    """
    size = theta.shape[0]

    def example(point: Any) -> Any:
        return jax.jacfwd(problem.inner_losses)(point[:size], point[size:], task)

    point = jnp.concatenate([theta, lam])
    slopes, moves = example(point), jax.jacfwd(example)(point)
    a = share(jnp.ones(slopes.shape[0]), task.support_mask)
    inner_if = -jnp.linalg.solve(jet.by_t, (a[:, None] * slopes).T)  # [m, n]
    slopes_move = a[:, None, None] * (moves[:, :, size:] + jnp.einsum("jmq,qa->jma", moves[:, :, :size], first))
    hessian_moves = jet.by_tl + jnp.einsum("npq,qa->npa", jet.by_tt, first)
    forcing = slopes_move + jnp.einsum("mpa,pj->jma", hessian_moves, inner_if)
    inner_if_moves = -jax.vmap(lambda column: jnp.linalg.solve(jet.by_t, column))(forcing)  # [n, m, p]
    return jnp.einsum("ma,mj->ja", outer.by_tl + outer.by_tt @ first, inner_if) + jnp.einsum(
        "m,jma->ja", outer.by_t, inner_if_moves
    )


@functools.cache
def _terms(name: str) -> Callable[..., TaskTerms]:
    problem = flat(name)

    def run(theta: Any, lam: Any, weights: mi.Weights) -> TaskTerms:
        def single(task: mi.Task, u: Any, v: Any, theta: Any) -> TaskTerms:
            return task_terms(problem, theta, lam, task, u, v)

        return over_tasks(problem, single, weights, theta)

    return jax.jit(run)


@functools.cache
def terms(name: str) -> TaskTerms:
    """`task_terms` of all tasks at the optimum, leading axis T."""
    point = solved(name)
    return jax.tree.map(np.asarray, _terms(name)(point.bases.theta, point.lam, point.weights))


def _mean(per_task: np.ndarray, weights: mi.Weights) -> np.ndarray:
    share_each = np.asarray(weights.task) / len(weights.task)
    return np.einsum("k,k...->...", share_each, per_task)


def curvatures(name: str) -> dict[str, np.ndarray]:
    """The dense matrices that the curvatures stand for at the optimum, the exact Hessian of R included."""
    point, t = solved(name), terms(name)
    identity = np.eye(len(point.lam))
    regularizer = np.asarray(jax.hessian(point.flat.regularizer)(point.lam))
    linearized = _mean(t.linearized, point.weights) + regularizer
    return {
        "exact": linearized + _mean(t.third, point.weights),
        "linearized": linearized,
        "gamma": linearized + _mean(t.gamma, point.weights) * identity,
        "gauss_newton": _mean(t.gauss_newton, point.weights) + regularizer,
        "direct": _mean(t.fixed, point.weights) + regularizer,
    }

"""The two-level quantities by jaxopt and optimistix, with the kinds of differentiation that these support."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import metainfluence as mi
from metainfluence.lab.bench.peers.problem import Fit, Problem, TaskLoss, features, inner_objective

_MAX_STEPS = 500


def jaxopt_implicit(problem: Problem, tol: Any) -> Fit:
    """L-BFGS, differentiated by the implicit function theorem with CG."""
    import jaxopt

    solver = jaxopt.LBFGS(
        functools.partial(inner_objective, head_l2=problem.head_l2),
        maxiter=_MAX_STEPS,
        tol=tol,
        implicit_diff=True,
        implicit_diff_solve=functools.partial(jaxopt.linear_solve.solve_cg, tol=tol, maxiter=_MAX_STEPS),
    )
    return lambda x, y, coefficients: solver.run(problem.zero_head, x, y, coefficients).params


def largest_curvature(problem: Problem) -> float:
    """The largest eigenvalue over tasks of the inner Hessian at the zero head, close to those along the path."""

    def largest(images: jax.Array, labels: jax.Array) -> jax.Array:
        x = features(problem.layers, images)

        def objective(head: jax.Array) -> jax.Array:
            coefficients = jnp.full(labels.shape, 1 / labels.size)
            return inner_objective(head.reshape(problem.zero_head.shape), x, labels, coefficients, problem.head_l2)

        return jnp.linalg.eigvalsh(jax.hessian(objective)(problem.zero_head.reshape(-1)))[-1]

    return float(jnp.max(jax.jit(jax.vmap(largest))(*problem.tasks.support)))


def jaxopt_unrolled(problem: Problem, num_steps: int, step_size: float) -> Fit:
    """Gradient descent, differentiated through."""
    import jaxopt

    solver = jaxopt.GradientDescent(
        functools.partial(inner_objective, head_l2=problem.head_l2),
        maxiter=num_steps,
        tol=0.0,
        stepsize=step_size,
        acceleration=False,
        implicit_diff=False,
        unroll=True,
        jit=True,
    )
    return lambda x, y, coefficients: solver.run(problem.zero_head, x, y, coefficients).params


def optimistix_implicit(problem: Problem, tol: Any) -> Fit:
    """BFGS with `ImplicitAdjoint`, whose linear solver is CG and is told that the Hessian is positive."""
    import lineax
    import optimistix

    solver = optimistix.BFGS(rtol=tol, atol=tol)
    adjoint = optimistix.ImplicitAdjoint(linear_solver=lineax.CG(rtol=tol, atol=tol, max_steps=_MAX_STEPS))

    def objective(head: jax.Array, args: Any) -> jax.Array:
        x, y, coefficients = args
        return inner_objective(head, x, y, coefficients, problem.head_l2)

    def fit(x: jax.Array, y: jax.Array, coefficients: jax.Array) -> jax.Array:
        return optimistix.minimise(
            objective,
            solver,
            problem.zero_head,
            (x, y, coefficients),
            max_steps=_MAX_STEPS,
            adjoint=adjoint,
            tags=frozenset({lineax.positive_semidefinite_tag}),
        ).value

    return fit


def gradients(loss: TaskLoss, layers: Any, tasks: mi.Task) -> Any:
    """Total gradients of all tasks."""
    return jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(layers, tasks, mi.unit_weights(tasks))


def slope(loss: TaskLoss, tasks: mi.Task) -> Callable[[Any], Any]:
    """The gradient of the mean loss."""

    def mean(layers: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss, in_axes=(None, 0, 0))(layers, tasks, mi.unit_weights(tasks)))

    return jax.grad(mean)


def reverse_over_reverse(loss: TaskLoss, layers: Any, tasks: mi.Task, vector: Any) -> Any:
    """A product with the Hessian of the mean loss, reverse over reverse, as a custom_vjp requires."""
    return jax.vjp(slope(loss, tasks), layers)[1](vector)[0]


def forward_over_reverse(loss: TaskLoss, layers: Any, tasks: mi.Task, vector: Any) -> Any:
    """The same, forward over reverse."""
    return jax.jvp(slope(loss, tasks), (layers,), (vector,))[1]


def scores_per_example(loss: TaskLoss, layers: Any, tasks: mi.Task, direction: Any) -> Any:
    """∂_w ⟨D_λL_k, direction⟩ of all support and query examples, by one gradient in λ per example.

    The examples of a task are mapped by vmap and the tasks run one after the other, since each example's gradient is as
    large as λ.
    """

    def dot(gradient: Any) -> jax.Array:
        return optax.tree.vdot(gradient, direction)

    def single(data: tuple[mi.Task, mi.Weights]) -> tuple[jax.Array, jax.Array]:
        task, weights = data
        count = weights.query.size

        def of_query(*example: jax.Array) -> jax.Array:
            alone = task._replace(query=jax.tree.map(lambda leaf: leaf[None], example))
            return dot(jax.grad(loss)(layers, alone, weights._replace(query=weights.query[:1]))) / count

        def by_support(layers: Any) -> jax.Array:
            return jax.grad(lambda w: loss(layers, task, weights._replace(support=w)))(weights.support)

        back = jax.vjp(by_support, layers)[1]
        return jax.vmap(lambda row: dot(back(row)[0]))(jnp.eye(weights.support.size)), jax.vmap(of_query)(*task.query)

    return jax.lax.map(single, (tasks, mi.unit_weights(tasks)))


def scores_at_once(loss: TaskLoss, layers: Any, tasks: mi.Task, direction: Any) -> Any:
    """The same by one derivative along the direction and one gradient in all weights; needs forward mode."""

    def single(task: mi.Task, weights: mi.Weights) -> tuple[jax.Array, jax.Array]:
        by_weights = jax.grad(lambda w: jax.jvp(lambda x: loss(x, task, w), (layers,), (direction,))[1])(weights)
        return by_weights.support, by_weights.query

    return jax.vmap(single)(tasks, mi.unit_weights(tasks))

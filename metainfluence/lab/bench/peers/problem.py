"""The two-level problem that every library solves: logistic heads on the features of a tanh MLP."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import metainfluence as mi

# (features [n, m], labels [n], coefficients [n]) -> head: how a library solves the inner level.
Fit = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# (layers, one task, its weights) -> the query loss.
TaskLoss = Callable[[Any, mi.Task, mi.Weights], jax.Array]


class Problem(NamedTuple):
    """Plain arrays, from which each library builds its own problem.

    Attributes:
      layers: λ, a tuple of (kernel `[n, m]`, bias `[m]`).
      head_l2: weight of ‖head‖² / 2 in the inner objective.
      ways: classes.
      tasks: support and query sets, each (images `[T, n, pixels]`, labels `[T, n]`).
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    head_l2: float
    ways: int
    tasks: mi.Task

    @property
    def zero_head(self) -> jax.Array:
        """`[m + 1, ways]`, the bias as the last row."""
        return jnp.zeros((self.layers[-1][1].shape[0] + 1, self.ways))

    @property
    def direction(self) -> Any:
        """A vector shaped like λ, for products and scores."""
        return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), self.layers)


def features(layers: Any, images: jax.Array) -> jax.Array:
    """Images `[n, pixels]` to features `[n, m]`."""
    for kernel, bias in layers:
        images = jnp.tanh(images @ kernel + bias[None])
    return images


def losses(head: jax.Array, features: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropies `[n]`."""
    return optax.softmax_cross_entropy_with_integer_labels(features @ head[:-1] + head[-1:], labels)


def inner_objective(
    head: jax.Array, features: jax.Array, labels: jax.Array, coefficients: jax.Array, head_l2: float
) -> jax.Array:
    """The objective that a task's head minimises."""
    return jnp.sum(losses(head, features, labels) * coefficients) + 0.5 * head_l2 * jnp.sum(jnp.square(head))


def task_loss(fit: Fit) -> TaskLoss:
    """The query loss with the head that a library fits."""

    def loss(layers: Any, task: mi.Task, weights: mi.Weights) -> jax.Array:
        (images, labels), (query_images, query_labels) = task.support, task.query
        head = fit(features(layers, images), labels, weights.support / labels.size)
        return jnp.mean(losses(head, features(layers, query_images), query_labels) * weights.query)

    return loss


def ours(problem: Problem, tol: Any) -> mi.Bilevel:
    """Our library's problem, which computes a task's features once, as all the compared problems do."""
    fit = mi.adaptation.implicit(
        losses,
        lambda features, labels: problem.zero_head,
        minimizer=mi.adaptation.newton_cg(tol=tol),
        linear_solver=mi.solvers.cg(tol=tol),
        regularizer=lambda head, features: 0.5 * problem.head_l2 * jnp.sum(jnp.square(head)),
    )

    def adapt(layers: Any, support: Any, coefficients: jax.Array) -> jax.Array:
        images, labels = support
        return fit(features(layers, images), labels, coefficients)

    def outer(head: jax.Array, layers: Any, query: Any) -> jax.Array:
        images, labels = query
        return losses(head, features(layers, images), labels)

    return mi.bilevel(outer, mi.adaptation.closed_form(adapt))


def dense_fit(problem: Problem, num_steps: int = 12) -> Fit:
    """The oracle's head: Newton's method with the dense Hessian, its last two steps differentiated.

    One Newton step from a minimum that is held fixed has the derivative that the implicit function theorem gives. Two
    steps have the second derivative too, since each step doubles the order to which the minimum is right.
    """
    shape = problem.zero_head.shape

    def fit(features: jax.Array, labels: jax.Array, coefficients: jax.Array) -> jax.Array:
        def step(head: jax.Array, x: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
            def objective(head: jax.Array) -> jax.Array:
                return inner_objective(head.reshape(shape), x, y, weights, problem.head_l2)

            return head - jnp.linalg.solve(jax.hessian(objective)(head), jax.grad(objective)(head))

        data = (features, labels, coefficients)
        fixed = jax.lax.stop_gradient(data)
        head = jax.lax.fori_loop(0, num_steps, lambda _, head: step(head, *fixed), problem.zero_head.reshape(-1))
        return step(step(jax.lax.stop_gradient(head), *data), *data).reshape(shape)

    return fit

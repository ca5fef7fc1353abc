"""Building blocks of the registry's problems: their type, networks, losses, regularisers and data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi


class Inner(NamedTuple):
    """θ = argmin Σ_j c_j loss_j(θ, λ) + regularizer(θ, λ)."""

    loss: Callable[..., Any]
    regularizer: Callable[..., Any]
    start: Callable[..., Any]


class Spec(NamedTuple):
    """A problem of the registry."""

    name: str
    meta_params: Any
    tasks: mi.Task
    model: Callable[..., Any]  # (params, meta_params, batch) -> outputs [n, ...]
    head: Callable[..., Any]  # (outputs, batch) -> losses [n]; convex in the outputs
    meta_regularizer: Callable[..., Any]
    adapt: Callable[..., Any]
    inner: Inner | None = None
    program: Callable[..., Any] | None = None  # (meta_params, support, coefficients) -> params
    reweighs_support: bool = True  # False: `adapt` is exact only where all support weights are 1

    def outer_loss(self, params: Any, meta_params: Any, batch: Any) -> Any:
        """Per-example outer losses."""
        return self.head(self.model(params, meta_params, batch), batch)

    def problem(self) -> mi.Bilevel:
        """The problem as most users state it."""
        return mi.bilevel(self.outer_loss, self.adapt, meta_regularizer=self.meta_regularizer)

    def problem_with_head(self) -> mi.Bilevel:
        """The same problem with the outer loss split into model and head, its adaptation compiled.

        Under `jit` JAX traces the adaptation once for all functions of the library that are built on the problem.
        """
        adapt = dataclasses.replace(self.adapt, adapt=jax.jit(self.adapt.adapt))
        return mi.bilevel(self.model, adapt, meta_regularizer=self.meta_regularizer, outer_head=self.head)


def dense_net(rng: np.random.Generator, *sizes: int) -> list[Any]:
    """Layers [inputs + 1, outputs] of a multilayer perceptron, biases in the last row; few leaves trace faster."""
    return [
        jnp.asarray(np.concatenate([rng.normal(size=(m, n)) / np.sqrt(m), 0.1 * rng.normal(size=(1, n))]))
        for m, n in itertools.pairwise(sizes)
    ]


def apply_net(net: Any, x: Any, activation: Callable[[Any], Any] = jnp.tanh) -> Any:
    """A multilayer perceptron, linear in its last layer."""
    for layer in net[:-1]:
        x = activation(x @ layer[:-1] + layer[-1:])
    return x @ net[-1][:-1] + net[-1][-1:]


def cross_entropy(logits: Any, batch: Any) -> Any:
    """Softmax cross-entropy with integer labels `batch["y"]`; logits here are too small to overflow."""
    return jnp.log(jnp.sum(jnp.exp(logits), axis=1)) - jnp.sum(one_hot(batch, logits) * logits, axis=1)


def one_hot(batch: Any, like: Any) -> Any:
    """Labels as rows shaped and typed like `like`."""
    return (batch["y"][:, None] == jnp.arange(like.shape[1], dtype=jnp.int32)[None]).astype(like.dtype)


def squared_error(outputs: Any, batch: Any) -> Any:
    """Half the squared distance to `batch["y"]`."""
    return 0.5 * jnp.sum((outputs - batch["y"]) ** 2, axis=1)


def softplus_error(outputs: Any, batch: Any) -> Any:
    """A smooth, convex, non-quadratic regression loss: log cosh of the residual."""
    residual = outputs - batch["y"]
    return jnp.sum(jnp.logaddexp(residual, -residual) - jnp.log(2.0), axis=1)


def square_norm(tree: Any) -> Any:
    """‖tree‖²."""
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))


def lenient(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs optax under JAX's usual promotion: its bias correction raises a float to an integer power."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def anchored(delta: float, anchor: Any) -> Callable[..., Any]:
    """δ Σ (d²/2 + d⁴/4) with d = λ − anchor.

    A plain l2 term would let λ collapse to 0 or leave the rotations of a feature space free, both with singular total
    Hessians; and its own Hessian, a multiple of the identity, could hide a mistake in how it is added.
    """

    def regularizer(meta_params: Any) -> Any:
        difference = jax.tree.map(jnp.subtract, meta_params, anchor)
        return delta * (0.5 * square_norm(difference) + sum(jnp.sum(d**4) for d in jax.tree.leaves(difference)) / 4)

    return regularizer


def classification_tasks(
    rng: np.random.Generator, supports: list[int], queries: list[int], classes: int, inputs: int
) -> mi.Task:
    """Tasks whose class centres differ; every class has a support example in every task."""
    tasks = []
    for n_support, n_query in zip(supports, queries, strict=True):
        centres = rng.normal(size=(classes, inputs))
        batches = []
        for n in (n_support, n_query):
            y = np.arange(n) % classes
            x = centres[y] + 0.6 * rng.normal(size=(n, inputs))
            batches.append({"x": jnp.asarray(x), "y": jnp.asarray(y, jnp.int32)})
        tasks.append(mi.Task(*batches))
    return mi.stack_tasks(tasks)


def regression_tasks(rng: np.random.Generator, supports: list[int], queries: list[int], inputs: int = 2) -> mi.Task:
    """Sinusoids of differing phase and direction, with noise."""
    tasks = []
    for n_support, n_query in zip(supports, queries, strict=True):
        direction, phase = rng.normal(size=inputs), rng.uniform(0, np.pi)
        batches = []
        for n in (n_support, n_query):
            x = rng.normal(size=(n, inputs))
            y = np.sin(x @ direction + phase)[:, None] + 0.1 * rng.normal(size=(n, 1))
            batches.append({"x": jnp.asarray(x), "y": jnp.asarray(y)})
        tasks.append(mi.Task(*batches))
    return mi.stack_tasks(tasks)

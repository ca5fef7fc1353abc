"""The bilevel problem solved by brute force, on flat vectors: values, derivatives by autodiff, and re-solves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

import metainfluence as mi
from oracles.parts import Spec
from oracles.problems import spec


class Flat(NamedTuple):
    """A problem on flat vectors; `task` is one task, `support` and `query` the weights of its examples."""

    spec: Spec
    unravel: Callable[..., Any]  # flat λ -> meta_params
    inner: Callable[..., Any] | None  # (θ, λ, task, support) -> the inner objective
    program: Callable[..., Any] | None  # (λ, task, support) -> flat θ
    start: Callable[..., Any]  # (λ, task) -> flat θ
    inner_losses: Callable[..., Any] | None  # (θ, λ, task) -> losses of the support examples
    outputs: Callable[..., Any]  # (θ, λ, task) -> outputs of the outer model on the query set
    losses: Callable[..., Any]  # (θ, λ, task) -> losses of the query examples
    regularizer: Callable[..., Any]  # (λ) -> R


class Base(NamedTuple):
    """A task's inner solution at some λ and u, as numbers without derivatives."""

    theta: Any  # [m]
    inverse: Any  # inverse of the inner Hessian [m, m]


def share(weights: Any, mask: Any) -> Any:
    """Weights over the number of real examples, 0 on padding."""
    if mask is None:
        return weights / weights.shape[0]
    return jnp.where(mask, weights, 0.0) / jnp.sum(jnp.where(mask, 1.0, 0.0))


@functools.cache
def flat(name: str) -> Flat:
    """The problem of that name on flat vectors."""
    s = spec(name)
    _, unravel = ravel_pytree(s.meta_params)

    def adapted(meta_params: Any, task: mi.Task) -> Any:
        if s.inner is not None:
            return s.inner.start(meta_params, task.support)
        return s.program(meta_params, task.support, jnp.ones(jax.tree.leaves(task.support)[0].shape[0]))

    first = jax.tree.map(lambda leaf: leaf[0], s.tasks)
    shapes = jax.eval_shape(adapted, s.meta_params, first)
    _, unravel_theta = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

    def inner(theta: Any, lam: Any, task: mi.Task, support: Any) -> Any:
        params, meta_params = unravel_theta(theta), unravel(lam)
        losses = s.inner.loss(params, meta_params, task.support)
        return jnp.sum(share(support, task.support_mask) * losses) + s.inner.regularizer(params, meta_params)

    def program(lam: Any, task: mi.Task, support: Any) -> Any:
        return ravel_pytree(s.program(unravel(lam), task.support, share(support, task.support_mask)))[0]

    return Flat(
        spec=s,
        unravel=unravel,
        inner=inner if s.inner else None,
        program=program if s.program else None,
        start=lambda lam, task: ravel_pytree(adapted(unravel(lam), task))[0],
        inner_losses=lambda theta, lam, task: s.inner.loss(unravel_theta(theta), unravel(lam), task.support),
        outputs=lambda theta, lam, task: s.model(unravel_theta(theta), unravel(lam), task.query),
        losses=lambda theta, lam, task: s.outer_loss(unravel_theta(theta), unravel(lam), task.query),
        regularizer=lambda lam: s.meta_regularizer(unravel(lam)),
    )


def base(problem: Flat, lam: Any, task: mi.Task, support: Any) -> Base:
    """θ by dense Newton steps with backtracking, to rounding; of an unrolled problem, what its program returns."""
    if problem.inner is None:
        theta = problem.program(lam, task, support)
        return Base(theta, jnp.eye(theta.shape[0]))

    def objective(theta: Any) -> Any:
        return problem.inner(theta, lam, task, support)

    def direction(theta: Any) -> Any:
        return jnp.linalg.solve(jax.hessian(objective)(theta), jax.grad(objective)(theta))

    def step(count: Any, theta: Any) -> Any:
        trials = theta[None] - 0.5 ** jnp.arange(8.0)[:, None] * direction(theta)[None]
        best = jnp.argmin(jax.vmap(objective)(trials))
        # The objective's value cannot tell points closer than √eps apart, so the last steps are taken whole.
        return trials[jnp.where(count < 20, best, 0)]

    theta = jax.lax.fori_loop(0, 24, step, problem.start(lam, task))
    return Base(theta, jnp.linalg.inv(jax.hessian(objective)(theta)))


def theta_near(problem: Flat, base: Base, lam: Any, task: mi.Task, support: Any) -> Any:
    """θ(λ, u) near the point where `base` was solved, as a program for autodiff: two simplified Newton steps.

    Each step θ − H⁻¹ ∂_θ L_in(θ, λ, u), H the inner Hessian at the base, gains one order of the perturbation: the first
    and second derivatives of two steps are those of the minimiser, with no implicit function theorem invoked.
    """
    if problem.inner is None:
        return problem.program(lam, task, support)
    theta = base.theta
    for _ in range(2):
        theta = theta - base.inverse @ jax.grad(problem.inner)(theta, lam, task, support)
    return theta


def partial_loss(problem: Flat, theta: Any, lam: Any, task: mi.Task, query: Any) -> Any:
    """L_k as a function of θ and λ, each on its own."""
    return jnp.sum(share(query, task.query_mask) * problem.losses(theta, lam, task))


def over_tasks(problem: Flat, fn: Callable[..., Any], weights: mi.Weights, *each: Any) -> Any:
    """fn(task, support weights, query weights, *each) for all tasks."""
    return jax.vmap(fn)(problem.spec.tasks, weights.support, weights.query, *each)


@functools.cache
def bases(name: str) -> Callable[..., Base]:
    """Compiled (λ, weights) -> Base of all tasks."""
    problem = flat(name)

    def run(lam: Any, weights: mi.Weights) -> Base:
        return over_tasks(problem, lambda task, u, _: base(problem, lam, task, u), weights)

    return jax.jit(run)


@functools.cache
def task_losses(name: str) -> Callable[..., Any]:
    """Compiled (λ [n, p], weights) -> L_k of all tasks [n, T], every inner problem solved anew."""
    problem = flat(name)

    def run(lam: Any, weights: mi.Weights) -> Any:
        def single(task: mi.Task, u: Any, v: Any) -> Any:
            return partial_loss(problem, base(problem, lam, task, u).theta, lam, task, v)

        return over_tasks(problem, single, weights)

    return jax.jit(jax.vmap(run, in_axes=(0, None)))


class Derivatives(NamedTuple):
    """F at one (λ, w) and its derivatives."""

    value: Any
    gradient: Any  # D_λ F [p]
    hessian: Any  # D_λ D_λ F [p, p]
    mixed: mi.Weights  # ∂_w D_λ F [*weight, p]


@functools.cache
def _derivatives(name: str, cut: bool) -> Callable[..., Derivatives]:
    problem = flat(name)

    def run(lam: Any, weights: mi.Weights, inner: Base) -> Derivatives:
        def objective(lam: Any, weights: mi.Weights) -> Any:
            def single(task: mi.Task, u: Any, v: Any, inner: Base) -> Any:
                theta = theta_near(problem, inner, jax.lax.stop_gradient(lam) if cut else lam, task, u)
                return partial_loss(problem, theta, lam, task, v)

            losses = over_tasks(problem, single, weights, inner)
            return jnp.mean(weights.task * losses) + problem.regularizer(lam)

        def slopes(lam: Any) -> Any:
            return jax.grad(objective, argnums=(0, 1))(lam, weights)

        hessian, mixed = jax.jacfwd(slopes)(lam)
        return Derivatives(objective(lam, weights), slopes(lam)[0], hessian, mixed)

    return jax.jit(run)


def derivatives(name: str, lam: Any, weights: mi.Weights, *, cut: bool = False) -> Derivatives:
    """Derivatives of F by automatic differentiation of the re-solving program; `cut` takes θ for constant in λ."""
    found = _derivatives(name, cut)(lam, weights, bases(name)(lam, weights))
    return jax.tree.map(np.asarray, found)


def resolve(name: str, lam: Any, weights: mi.Weights) -> np.ndarray:
    """λ*(w) from a nearby λ, by dense Newton steps until they no longer move it."""
    for _ in range(12):
        d = derivatives(name, lam, weights)
        step = np.linalg.solve(d.hessian, d.gradient)
        lam = lam - step
        if np.linalg.norm(step) < 1e-14 * np.linalg.norm(lam):
            break
    return lam


def minimise(name: str, weights: mi.Weights) -> np.ndarray:
    """λ*(w) from the problem's initial λ: a trust region, then dense Newton steps."""
    found = scipy.optimize.minimize(
        lambda lam: float(derivatives(name, lam, weights).value),
        ravel(flat(name).spec.meta_params),
        jac=lambda lam: derivatives(name, lam, weights).gradient,
        hess=lambda lam: derivatives(name, lam, weights).hessian,
        method="trust-exact",
        options={"gtol": 1e-5, "maxiter": 200},
    )
    return resolve(name, found.x, weights)


class Solved(NamedTuple):
    """A problem at its optimum λ*(w), the point where the exactness tests are run."""

    name: str
    flat: Flat
    lam: Any
    weights: mi.Weights
    bases: Base  # of all tasks
    derivatives: Derivatives

    @property
    def meta_params(self) -> Any:
        """λ* as the user's pytree."""
        return self.flat.unravel(self.lam)


def random_weights(name: str) -> mi.Weights:
    """Weights that differ for all data, so that no factor can hide behind a 1."""
    s, rng = spec(name), np.random.default_rng(77)
    count, support = jax.tree.leaves(s.tasks.support)[0].shape[:2]
    query = jax.tree.leaves(s.tasks.query)[0].shape[1]
    drawn = [jnp.asarray(rng.uniform(0.6, 1.4, shape)) for shape in ((count,), (count, support), (count, query))]
    if not s.reweighs_support:
        drawn[1] = jnp.ones((count, support))
    return mi.Weights(*drawn)


@functools.cache
def solved(name: str) -> Solved:
    """The problem, optimised once per session."""
    weights = random_weights(name)
    lam = jnp.asarray(minimise(name, weights))
    return Solved(name, flat(name), lam, weights, bases(name)(lam, weights), derivatives(name, lam, weights))


# Truncation of the extrapolated difference is O(h⁴) and rounding O(eps/h); both are near 1e-12 of the functions' own
# scale at h = eps^(1/5), for functions of unit scale whose values are exact to rounding, as those of dense Newton are.
STEP = float(np.finfo(np.float64).eps ** 0.2)


def offsets(step: float = STEP) -> np.ndarray:
    """Where `difference` wants the function: [+h, −h, +h/2, −h/2]."""
    return step * np.array([1.0, -1.0, 0.5, -0.5])


def difference(values: Any, step: float = STEP) -> np.ndarray:
    """Central differences at h and h/2, extrapolated to h → 0 (Richardson); `values` [4, ...] at `offsets`."""
    plus, minus, half_plus, half_minus = np.asarray(values)
    return (4.0 * (half_plus - half_minus) / step - (plus - minus) / (2.0 * step)) / 3.0


def relative_error(got: Any, expected: Any) -> float:
    """‖got − expected‖ / ‖expected‖, in the Euclidean norm over all entries."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float(np.linalg.norm((got - expected).ravel()) / np.linalg.norm(expected.ravel()))


def row(tree: Any, k: int) -> Any:
    """Entry k of every leaf."""
    return jax.tree.map(lambda leaf: leaf[k], tree)


def rows(tree: Any) -> np.ndarray:
    """A pytree of λ-shaped leaves with a common leading axis, as a matrix [n, p] in the order of flat λ."""
    return np.concatenate([np.reshape(leaf, (leaf.shape[0], -1)) for leaf in jax.tree.leaves(tree)], axis=1)


def ravel(tree: Any) -> np.ndarray:
    """A λ-shaped pytree as a flat vector."""
    return np.asarray(ravel_pytree(tree)[0])


def moved(weights: mi.Weights, step: float, **directions: Any) -> mi.Weights:
    """Weights moved by `step` along directions in some of their fields."""
    return weights._replace(**{field: getattr(weights, field) + step * d for field, d in directions.items()})


@functools.cache
def optimum_differences(name: str) -> dict[str, tuple[dict[str, np.ndarray], np.ndarray]]:
    """dλ*/dw along chosen directions in w, by central differences of the re-optimised λ*(w ± ε).

    Returns:
      For "task", "support", "query" (the weight of one datum of the last task) and "random" (all weights at once): the
      direction by field, and the derivative of λ* along it.
    """
    point, rng = solved(name), np.random.default_rng(3)
    last, example = len(point.weights.task) - 1, 1
    directions = {}
    for field in mi.Weights._fields:
        one = np.zeros(getattr(point.weights, field).shape)
        one[last if field == "task" else (last, example)] = 1.0
        directions[field] = {field: one}
    size = sum(leaf.size for leaf in point.weights)
    directions["random"] = {
        field: rng.normal(size=getattr(point.weights, field).shape) / size**0.5 for field in mi.Weights._fields
    }

    def along(direction: dict[str, np.ndarray]) -> np.ndarray:
        return difference([resolve(name, point.lam, moved(point.weights, h, **direction)) for h in offsets()])

    return {kind: (direction, along(direction)) for kind, direction in directions.items()}

"""What the library says about each problem of the registry at its optimum, compiled once per session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metainfluence as mi
from oracles.problems import KINDS, spec
from oracles.reference import solved

CURVATURES = ("exact", "linearized", "gamma", "gauss_newton", "direct")


@functools.cache
def problem(name: str) -> mi.Bilevel:
    """The problem of that name."""
    return spec(name).problem_with_head()


def target(meta_params: Any, coefficients: Any) -> Any:
    """Σ c sin λ: a target whose gradient c cos λ needs no adaptation."""
    terms = jax.tree.map(lambda m, c: jnp.sum(c * jnp.sin(m)), meta_params, coefficients)
    return jax.tree.reduce(jnp.add, terms)


@functools.cache
def target_coefficients(name: str) -> Any:
    """Coefficients of `target`."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), solved(name).meta_params)


def random_direction(name: str, seed: int = 6) -> mi.Weights:
    """A direction in the space of data weights."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), solved(name).weights)


@functools.cache
def gradient_fn(name: str) -> Callable[..., Any]:
    """Compiled (meta_params, tasks, weights) -> (L_k [T], D_λ L_k [T, ...], F)."""

    def run(meta_params: Any, tasks: mi.Task, weights: mi.Weights) -> Any:
        losses = jax.vmap(mi.task_loss(problem(name)), in_axes=(None, 0, 0))(meta_params, tasks, weights)
        gradients = jax.vmap(mi.total_gradient(problem(name)), in_axes=(None, 0, 0))(meta_params, tasks, weights)
        return losses, gradients, mi.total_objective(problem(name))(meta_params, tasks, weights)

    return jax.jit(run)


@functools.cache
def hessians(name: str) -> dict[str, np.ndarray]:
    """The matrices of the curvatures, from products with unit vectors and not symmetrised."""

    def run(meta_params: Any, tasks: mi.Task, weights: mi.Weights) -> dict[str, Any]:
        found = {}
        for kind in CURVATURES if name in KINDS else ("exact",):
            operator = mi.total_hessian(problem(name), getattr(mi.curvature, kind)())(meta_params, tasks, weights)
            found[kind] = jax.vmap(operator.flat_matvec)(jnp.eye(operator.size)).T
        return found

    point = solved(name)
    return jax.tree.map(np.asarray, jax.jit(run)(point.meta_params, spec(name).tasks, point.weights))


@functools.cache
def influences(name: str) -> dict[str, Any]:
    """Every influence, by the dense solver where nothing else is said."""
    dense = mi.solvers.dense()
    of = problem(name)

    def run(meta_params: Any, tasks: mi.Task, weights: mi.Weights, direction: mi.Weights, coefficients: Any) -> Any:
        def instances(side: str) -> Any:
            single = mi.instance_if(of, side, solver=dense)
            return jax.vmap(lambda index: single(meta_params, tasks, index, weights))(jnp.arange(len(weights.task)))

        def scores(solver: mi.Solver) -> mi.Scores:
            return mi.influence_scores(of, target, solver=solver)(meta_params, tasks, coefficients, weights=weights)

        return {
            "task": mi.task_if(of, solver=dense)(meta_params, tasks, weights),
            "support": instances("support"),
            "query": instances("query"),
            "group": mi.group_influence(of, solver=dense)(meta_params, tasks, direction, weights),
            "scores": scores(dense),
            "scores_cg": scores(mi.solvers.cg(tol=1e-9)),
        }

    point = solved(name)
    arguments = (point.meta_params, spec(name).tasks, point.weights, random_direction(name), target_coefficients(name))
    return jax.tree.map(np.asarray, jax.jit(run)(*arguments))

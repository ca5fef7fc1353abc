"""A small convex meta-learning problem, trained by dense Newton steps until it stands still."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import metainfluence as mi

NUM_TASKS, SIZE = 12, 3


def closed_form(meta_params, support, coefficients):
    """Ridge regression drawn to the meta-parameters: affine in them."""
    x = support["x"]
    gram = jnp.einsum("n,nd,ne->de", coefficients, x, x) + jnp.eye(SIZE)
    return jnp.linalg.solve(gram, jnp.einsum("n,nd,n->d", coefficients, x, support["y"]) + meta_params)


def outer_loss(params, meta_params, query):
    """log cosh of the residual: convex, and not quadratic."""
    del meta_params
    residual = query["x"] @ params - query["y"]
    return jnp.logaddexp(residual, -residual) - jnp.log(2.0)


PROBLEM = mi.bilevel(outer_loss, mi.adaptation.closed_form(closed_form), meta_regularizer=mi.l2(0.05))
START = jnp.zeros(SIZE)


@functools.cache
def tasks(count=NUM_TASKS, seed=0):
    """Linear tasks whose directions scatter around a common one."""
    rng = np.random.default_rng(seed)

    def side(direction, n):
        x = rng.normal(size=(n, SIZE))
        return {"x": jnp.asarray(x), "y": jnp.asarray(x @ direction + 0.1 * rng.normal(size=n))}

    directions = np.array([1.0, -0.5, 0.3]) + 0.7 * rng.normal(size=(count, SIZE))
    return mi.stack_tasks([mi.Task(side(direction, 3), side(direction, 4)) for direction in directions])


def train(weights, tasks, start, num_steps=12):
    """Newton's method; it works under vmap."""
    objective = mi.total_objective(PROBLEM)

    def step(_, meta_params):
        gradient, hessian = (d(objective)(meta_params, tasks, weights) for d in (jax.grad, jax.hessian))
        return meta_params - jnp.linalg.solve(hessian, gradient)

    return jax.lax.fori_loop(0, num_steps, step, start)
